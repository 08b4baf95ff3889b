"""Nodes that read chunks from each other's host memory."""
