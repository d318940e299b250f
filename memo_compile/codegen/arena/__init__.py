"""Where every buffer of the emitted code lies."""
