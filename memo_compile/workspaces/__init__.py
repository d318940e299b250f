"""What a call allocates for itself while it runs, beyond its results: by formula, as measured, by its subgraph."""
