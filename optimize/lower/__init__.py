"""Rewrites of the portable graph for one target."""
