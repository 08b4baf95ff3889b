"""The tests. Engines and servers are real; only `tests/e2e` starts an engine."""
