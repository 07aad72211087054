"""What is assumed of a model's sequences."""

from __future__ import annotations

MOST_SEQUENCE = 8192
"""Tokens of a sequence where nothing else is asked: contexts of today are longer than pretraining sequences."""
