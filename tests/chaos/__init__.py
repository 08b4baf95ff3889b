"""Killing things at random, for as long as one likes."""
