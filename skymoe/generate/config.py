"""What the user asks of `skymoe generate`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from skymoe.base.config import Config
from skymoe.base.dtype import DType


class GenerateConfig(Config):
    """One continuation of one prompt.

    Attributes:
        model: a Hugging Face model directory with `tokenizer.json`.
        prompt: the text to continue; "-" reads it from standard input.
        max_tokens: the most tokens to write.
        temperature: 0 is greedy, 1 the model's own distribution.
        top_k: sample among the k most likely tokens; 0 among all.
        top_p: sample among the fewest tokens whose probabilities sum to p; 1 among all.
        seed: the same seed gives the same text on the same machine; None takes a fresh one and reports it.
        ignore_eos: go on after the end-of-text token.
        dtype: load the weights in this format; None keeps that of the files.
        device: a torch device such as `cpu` or `cuda:0`.
    """

    model: Path
    prompt: str
    max_tokens: int = Field(default=128, ge=1)
    temperature: float = Field(default=0.8, ge=0, le=100)
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int | None = Field(default=0, ge=0, lt=2**63)
    ignore_eos: bool = False
    dtype: DType | None = None
    device: str = "cpu"
