"""What the user asks of `skymoe inspect`."""

from __future__ import annotations

from pydantic import Field

from skymoe.base.config import Config


class InspectConfig(Config):
    """One model, by directory or by preset name."""

    model: str = Field(min_length=1)
    """a Hugging Face model directory, or the name of a preset such as `skywork-moe`"""
    sequence_length: int | None = Field(default=None, ge=1)
    """tokens of context for the FLOP count; without it the model's own context length"""
    weights: bool = True
    """read a directory's weights for router and expert statistics; otherwise only their headers"""
    chunk_bytes: int = Field(default=256 * 2**20, ge=1024)
    """the most bytes of one layer's experts held at a time, in fp32"""
