"""What the user asks of `skymoe inspect`."""

from __future__ import annotations

from pydantic import Field

from skymoe.base.config import Config


class InspectConfig(Config):
    """One model, by directory or by preset name.

    Attributes:
        model: a Hugging Face model directory, or the name of a preset such as `skywork-moe`.
        sequence_length: tokens of context for the FLOP count; None takes the model's own context length.
        weights: read the weights of a directory (router and expert statistics); False reads only headers.
        chunk_bytes: the most bytes of one layer's experts held in fp32 at a time.
    """

    model: str = Field(min_length=1)
    sequence_length: int | None = Field(default=None, ge=1)
    weights: bool = True
    chunk_bytes: int = Field(default=256 * 2**20, ge=1024)
