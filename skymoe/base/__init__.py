"""Floor 0: errors, dtype names, recipes, progress, files that are there whole or not at all. No torch."""
