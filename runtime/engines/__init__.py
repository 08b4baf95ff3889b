"""Engines' OpenAI servers over HTTP: connections, and tokens through `/v1/completions`."""
