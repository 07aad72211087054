"""The inference engine: continuous batching over a paged key/value cache, on any division of a model over ranks."""
