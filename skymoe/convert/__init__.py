"""Floor 5: model directories into another one, a tensor at a time: the engine of upcycle, export and quantize."""
