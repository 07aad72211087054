"""Layouts for training: every way to use N GPUs, priced, ranked and explained."""
