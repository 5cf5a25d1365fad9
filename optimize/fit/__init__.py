"""Will a model fit a device, and how fast can it run there at most."""
