"""`memo check`: memory and time against a committed baseline."""
