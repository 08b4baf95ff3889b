"""A node's stream for routers: what its engines and tiers hold, as it changes and as a whole."""
