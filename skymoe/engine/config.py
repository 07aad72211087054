"""What the user asks of an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from skymoe.base.config import Config
from skymoe.base.dtype import DType


class EngineConfig(Config):
    """A model, how it is divided, and how much it may hold."""

    model: Path
    """a Hugging Face model directory"""
    tp: int | None = Field(default=None, ge=1, le=1024)
    """tensor-parallel ranks, divided as evenly as possible; default: what `split` or `plan` say, else 1"""
    split: tuple[str, ...] = ()
    """`heads=5,5,4`, `kv_heads=`, `ffn=` (columns), `experts=`, `vocabulary=`: units per rank; `weights=3,1`: shares"""
    plan: Path | None = None
    """a serving plan, as `skymoe plan serve --save` writes it"""
    rotate: bool = True
    """let the remainder of a division go round the ranks from layer to layer, so that every rank has as much"""
    dtype: DType | None = None
    """of weights that are not FP8, and of the activations; default: that of the files"""
    kv_dtype: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    """of the key/value cache; `auto` is that of the activations"""
    max_model_len: int | None = Field(default=None, ge=1)
    """the most tokens of a request, prompt and answer; default: the model's context"""
    kv_memory_gb: float | None = Field(default=None, gt=0, le=1 << 20)
    """gigabytes (10^9) of keys and values per rank; default: `max_batch` sequences of `max_model_len`, at most half
    of the memory that is free"""
    page_size: int = Field(default=16, ge=1, le=256)
    """tokens of a page"""
    max_batch: int = Field(default=64, ge=1, le=4096)
    """the most sequences in a step"""
    max_step_tokens: int = Field(default=512, ge=1, le=1 << 20)
    """the most tokens in a step; longer prompts are read in chunks"""
    max_queue: int = Field(default=1024, ge=1, le=1 << 20)
    """the most requests waiting"""
    prefix_cache: bool = True
    """share the pages of equal beginnings"""
    device: str = "cpu"
    """`cpu`, or `cuda` (one device per rank)"""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """threads of a rank on a CPU; default: the cores of the machine over the ranks"""
    timeout_s: float = Field(default=60.0, gt=0, le=86400)
    """how long ranks wait for each other within a step"""
