"""`kvbm`: what operators see and do, over the admin API of a node's daemon."""
