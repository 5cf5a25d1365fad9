"""The proof that a bundle matches its PyTorch source."""
