"""The connector on vLLM's offloading seam, without an engine: each half driven as vLLM does."""
