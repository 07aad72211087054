"""Floor 0: errors, dtype names, configuration files, logging. No torch."""
