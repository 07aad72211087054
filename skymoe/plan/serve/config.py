"""What the user asks of `skymoe plan serve`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Literal

from pydantic import Field

from skymoe.base.config import Config


class Objective(StrEnum):
    """What the division of memory is for."""

    LATENCY = "latency"
    THROUGHPUT = "throughput"


_Batch = tuple[int, ...]


class PlanServeConfig(Config):
    """One model on some GPUs of one server, which need not be equal."""

    model: str = Field(min_length=1)
    """a preset such as `skywork-moe`, or a Hugging Face model directory (its weights are not read)"""
    gpus: str = Field(min_length=1, max_length=2000)
    """`8xrtx4090`, or `4xrtx4090,2xrtx3090`; the order is that of the ranks"""
    weights: Literal["fp32", "bf16", "fp8", "int8", "int4", "nvfp4"] = "bf16"
    """how matrices are stored; embedding, head and routers stay in bf16 (or fp32)"""
    kv: Literal["fp32", "bf16", "fp8"] = "bf16"
    """how keys and values are stored"""
    context: int | None = Field(default=None, ge=1, le=1 << 27)
    """the longest sequence, prompt and output; at least one must have room. None for 4096, or what a request
    has, or the model's if less"""
    batch: _Batch = Field(default=(1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256), min_length=1, max_length=64)
    """sequences at a time that are tried"""
    prompt: int = Field(default=128, ge=1, le=1 << 27)
    """tokens of a request's prompt"""
    output: int = Field(default=128, ge=1, le=1 << 27)
    """tokens of its answer"""
    split: tuple[str, ...] = Field(default=(), max_length=8)
    """divisions that are given: `heads=5,5,4`, `ffn=` (columns or blocks), `experts=`, `vocabulary=` (rows), or
    `weights=3,1` for all of them in proportion"""
    reserve: float | None = Field(default=None, ge=0, le=1e4)
    """GB of each GPU for neither weights nor keys and values; None for the engine's"""
    rotate: bool = True
    """the remainder of heads and blocks goes round the equal GPUs layer by layer"""
    experts: Literal["cut", "whole"] = "cut"
    """every GPU a part of every expert's columns, or whole experts"""
    objective: Objective = Objective.THROUGHPUT
    """`latency`: the fastest step; `throughput`: a slower one where that leaves room for more sequences"""
    engine: str = Field(default="skymoe", min_length=1, max_length=100)
    """whose overheads: `skymoe` (assumed), `trtllm-engine`, `trtllm-pytorch`"""
    price: float | None = Field(default=None, gt=0, le=1e6)
    """money per GPU hour, for the cost of a million tokens"""
    compare: str | None = Field(default=None, min_length=1)
    """another model on the same GPUs, such as the dense `llama-3-70b`"""
    save: Path | None = None
    """write the plan file that `skymoe serve --plan` reads"""
    html: Path | None = None
    """write the report as one page that needs no network"""
