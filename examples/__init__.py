"""Programs that show the project at work; never part of the wheel."""
