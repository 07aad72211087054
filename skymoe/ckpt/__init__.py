"""Floor 6: `skymoe ckpt ls|verify|diff`, the look at checkpoints from outside. No torch."""
