"""What the user asks of `skymoe generate`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from skymoe.base.config import Config
from skymoe.base.dtype import DType
from skymoe.engine.config import EngineConfig


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


class BatchConfig(Config):
    """Many continuations: a file of prompts in, a file of answers out."""

    engine: EngineConfig
    """the model and how it is run; `model` needs `tokenizer.json` where prompts are text"""
    input: Path
    """JSON Lines; docs/generate_batch.md has the format"""
    output: Path
    """JSON Lines, a line per prompt, in the order in which they are done"""
    overwrite: bool = False
    """begin anew where the output exists"""
    max_tokens: int | None = Field(default=128, ge=1, lt=2**31)
    """the most tokens to write, where a line does not say; null until the context is full"""
    temperature: float = Field(default=0.8, ge=0, le=100)
    """where a line does not say; 0 is greedy"""
    top_k: int = Field(default=0, ge=0, lt=2**31)
    """where a line does not say; 0 is all"""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """where a line does not say"""
    seed: int = Field(default=0, ge=0, lt=2**62)
    """line i is drawn with seed + i, where it does not say"""
    ignore_eos: bool = False
    """go on after the end-of-text token, where a line does not say"""
