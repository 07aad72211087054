"""From what the user asks to a serving plan: which rank has what. No torch."""
