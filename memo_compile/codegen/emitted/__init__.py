"""Reading what Inductor emitted, and checking it."""
