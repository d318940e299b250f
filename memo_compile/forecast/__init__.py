"""`memo plan`: a step of a long model on many ranks, from one traced layer."""
