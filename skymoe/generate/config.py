"""What the user asks of `skymoe generate`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from skymoe.base.config import Config
from skymoe.base.dtype import DType


class GenerateConfig(Config):
    """One continuation of one prompt."""

    model: Path
    """a Hugging Face model directory with `tokenizer.json`"""
    prompt: str
    """the text to continue; "-" reads it from standard input"""
    max_tokens: int = Field(default=128, ge=1)
    """the most tokens to write"""
    temperature: float = Field(default=0.8, ge=0, le=100)
    """0 is greedy, 1 the model's own distribution"""
    top_k: int = Field(default=0, ge=0)
    """sample among the k most likely tokens; 0 among all"""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """sample among the fewest tokens whose probabilities sum to p; 1 among all"""
    seed: int | None = Field(default=0, ge=0, lt=2**63)
    """the same seed gives the same text on the same machine; null takes a fresh one and reports it"""
    ignore_eos: bool = False
    """go on after the end-of-text token"""
    dtype: DType | None = None
    """load the weights in this format; without it that of the files"""
    device: str = "cpu"
    """a torch device such as `cpu` or `cuda:0`"""
