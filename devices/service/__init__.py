"""``edgekit service``: a configuration as a systemd service."""
