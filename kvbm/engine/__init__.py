"""Engines of any kind as instances: their place in discovery, their health, their end."""
