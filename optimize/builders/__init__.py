"""Engine builders, one for each backend."""
