"""The block manager and its daemon."""
