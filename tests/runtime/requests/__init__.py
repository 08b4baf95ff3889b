"""Tests of the request plane."""
