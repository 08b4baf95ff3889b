"""The `kvbm-daemon` process: settings, control socket, admin API and the loop around the manager."""
