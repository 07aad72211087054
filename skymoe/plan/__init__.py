"""Decisions on paper: the order of work in a pipeline, and how long it takes."""
