"""The block manager: what is where, who uses it, and what moves when."""
