"""Passes that only look: they annotate, and change no graph."""
