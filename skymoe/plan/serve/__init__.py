"""Layouts for serving: units over unequal GPUs, what fits, how fast."""
