"""What the parsers of engine builders read: one TOML file each."""
