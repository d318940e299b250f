"""Passes around Inductor's scheduler: the order of transfers, and what fusion loses."""
