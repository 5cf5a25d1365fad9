"""The hardware and software stacks that exist, one TOML file each."""
