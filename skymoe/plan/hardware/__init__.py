"""What machines can do, as data with sources: GPUs, links, and the constants of the laws that use them."""
