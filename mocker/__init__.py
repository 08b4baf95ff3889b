"""An engine without a model, and replay of traces in virtual time."""
