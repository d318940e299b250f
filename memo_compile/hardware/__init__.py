"""Rates and memory of devices and hosts."""
