"""What every program here stands on: settings, logging, the event plane, embedded servers."""
