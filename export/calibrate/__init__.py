"""Quantizing by what text does in a model: layer by layer, into a standard compressed-tensors checkpoint."""
