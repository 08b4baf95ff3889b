"""Measurements against physical limits and peers; each module is a command, `make bench-NAME`."""
