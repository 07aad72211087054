"""Floor 3: weights on disk. `header`, `index`, `manifest` and `verify` need no torch; import the file you need."""
