"""Floor 1: what things are. Frozen, validated once on construction, no torch."""
