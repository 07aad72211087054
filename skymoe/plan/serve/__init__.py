"""Serving on paper: a model divided over equal or unequal GPUs, what fits, and how many tokens a second it gives."""
