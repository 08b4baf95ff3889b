"""The `kvbm-daemon` process: settings, control socket, admin API and the manager's loop."""
