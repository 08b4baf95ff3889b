"""OpenAI's HTTP API before a fleet: routed on tokens, passed through or made from tokens."""
