"""From an annotated joint graph to a plan: which activation is kept, offloaded or recomputed."""
