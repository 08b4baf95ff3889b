"""Tests of the mock engine and of replay."""
