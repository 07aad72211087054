"""Floor 5: one model directory (or several) into another, one tensor at a time: the engine of upcycle, export, quantize."""
