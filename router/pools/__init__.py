"""The global router: of several pools of engines, which one a request goes to."""
