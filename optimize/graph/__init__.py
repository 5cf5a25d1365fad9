"""Passes that clean the traced graph."""
