"""One file for a Jetson: the bundle, how its engine is built there, the runtime and its wheels, and what installs them."""
