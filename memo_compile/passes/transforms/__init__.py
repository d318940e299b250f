"""Passes that act on what was annotated and decided."""
