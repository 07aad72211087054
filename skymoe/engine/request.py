"""One request on its way through the engine. No torch."""
