"""What it costs a model's answers to store a weight in fewer bits, measured weight by weight, and which mix costs least."""
