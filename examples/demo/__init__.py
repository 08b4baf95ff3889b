"""The demo: two engines, one daemon, every tier, measured by a user's clock."""
