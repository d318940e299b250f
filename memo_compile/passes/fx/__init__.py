"""What the passes share about FX graphs: facts about a node, builders, provenance."""
