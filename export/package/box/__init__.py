"""What is copied into a package as it is, and runs on the box."""
