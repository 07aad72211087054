"""The inspect job: what a model is, what it costs, and how its router and experts look."""
