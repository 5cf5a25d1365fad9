"""Rounding weights to fewer bits."""
