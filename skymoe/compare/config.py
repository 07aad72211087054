"""What the user asks of `skymoe merge-check`."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from skymoe.base.config import Config


class CompareConfig(Config):
    """Two model directories, A and B."""

    left: Path
    """A, a Hugging Face model directory"""
    right: Path
    """B, the same"""
    tolerance: float | None = Field(default=None, ge=0)
    """the largest |A - B| of a tensor that is still equal, as a part of its largest |A|; without it bits must be equal,
    with 0 the values, whatever their number format"""
    experts: bool = False
    """compare every expert of B with the dense feed-forward that A has in the same layer: how far did an upcycled
    model drift? What only an MoE layer has (routers, shared experts) is then expected and no difference"""
    raw: bool = False
    """pair tensors by their names in the files and compare what is stored, without looking at what the model is"""
    block_bytes: int = Field(default=16 * 2**20, ge=64)
    """the most bytes of one tensor held at a time, in fp64"""

    @model_validator(mode="after")
    def _experts_need_a_spec(self) -> Self:
        if self.raw and self.experts:
            raise ValueError("experts needs the places of tensors, raw looks at their names only: choose one")
        return self
