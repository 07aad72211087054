"""The roof: what makes other programs know our models. Only here is transformers imported; no room knows of it."""
