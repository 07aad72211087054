"""The main job end to end, composed of the other jobs: text, dense model, upcycling, training, report."""
