"""A mixed load for as long as one likes, and nothing that grows with time."""
