"""Tests that start real vLLM engines; one engine is shared by as many tests as can share it."""
