"""Whole programs drawn from a seed, an oracle that says whether memo runs them right, and what makes failures small."""
