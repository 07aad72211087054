"""Floor 6: `skymoe ckpt ls|verify|diff|reshard|export`, checkpoints from outside. No torch, except in `export`."""
