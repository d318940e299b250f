"""A joint graph from a model: Dynamo's frames, tracing without running, models by name."""
