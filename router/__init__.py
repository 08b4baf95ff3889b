"""Which worker a request goes to, and why: hashing, block index, load, costs, choice."""
