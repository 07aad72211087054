"""Floor 4: the decoder, written for one device. Parallelism is applied from outside."""
