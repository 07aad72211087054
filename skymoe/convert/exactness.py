"""Does the new model compute what the old one did? A promise in real arithmetic, with its reason. No torch.

A job knows from its plan whether it is exact; the receipt (`receipt.py`) holds the promise against the files. Which
formats can carry a model without loss is decided in one place, `spec.hf_families.uncarried`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Exactness:
    """Whether a conversion keeps the function, in real arithmetic, and why."""

    exact: bool
    reason: str
