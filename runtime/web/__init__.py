"""HTTP APIs of our programs: served in their own event loop, with one shape of errors and rules."""
