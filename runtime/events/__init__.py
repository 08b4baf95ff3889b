"""The event plane."""
