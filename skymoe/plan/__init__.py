"""Decisions on paper: what a layout costs in time and memory, which is best, and how far to trust that."""
