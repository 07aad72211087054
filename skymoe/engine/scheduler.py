"""Which tokens run in the next step. No torch."""
