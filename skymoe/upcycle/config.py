"""What the user asks of `skymoe upcycle`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from skymoe.base.config import Config
from skymoe.base.dtype import DType


class Method(StrEnum):
    """How the experts are made of the dense feed-forward."""

    COPY = "copy"


class TargetFormat(StrEnum):
    """Which architecture the output directory is written as."""

    AUTO = "auto"  # the native one of transformers that carries it exactly, else skymoe
    SKYMOE = "skymoe"
    SKYWORK = "skywork"  # Skywork-MoE's names and fields; for Llama-shaped parents


class UpcycleConfig(Config):
    """One conversion.

    Attributes:
        source: the dense model, a Hugging Face directory.
        out: the directory to create.
        method: `copy`: every expert is the dense feed-forward.
        experts, top_k: experts per MoE layer, and how many a token uses.
        layers: ids of the layers that become MoE; None means all.
        gate_norm: gating logit normalization (Skywork-MoE Eq. 6).
        gate_scale, gate_ddof, gate_eps: its lambda, degrees of freedom of the deviation, and guard.
        router_std: standard deviation of the new router weights. Never zero: a zero router sends every token to the
            same experts, and the balance loss has no gradient to change that.
        format: architecture of the output.
        dtype: of the output's weights; None keeps the source's.
        seed: of the routers, and of the receipt's tokens.
        receipt_tokens: length of each of the receipt's two random sequences; 0 writes no measurements.
        max_shard_bytes: most bytes in one weight file.
        overwrite: replace an existing output directory.
    """

    source: Path
    out: Path
    method: Method = Method.COPY
    experts: int = Field(default=8, ge=2, le=65536)
    top_k: int = Field(default=2, ge=1)
    layers: tuple[int, ...] | None = None
    gate_norm: bool = False
    gate_scale: float = Field(default=1.0, gt=0)
    gate_ddof: int = Field(default=1, ge=0, le=1)
    gate_eps: float = Field(default=1e-6, ge=0, lt=1)
    router_std: float = Field(default=0.02, gt=0, le=10)
    format: TargetFormat = TargetFormat.AUTO
    dtype: DType | None = None
    seed: int = Field(default=0, ge=0)
    receipt_tokens: int = Field(default=64, ge=0, le=65536)
    max_shard_bytes: int = Field(default=5_000_000_000, ge=1_000)
    overwrite: bool = False

    @model_validator(mode="after")
    def _top_k_within_experts(self) -> Self:
        if self.top_k > self.experts:
            raise ValueError(f"top_k is {self.top_k}, but there are only {self.experts} experts")
        if self.layers is not None and (not self.layers or list(self.layers) != sorted(set(self.layers))):
            raise ValueError("layers must be ascending layer ids, at least one")
        if self.dtype is not None and self.dtype not in (DType.FLOAT32, DType.BFLOAT16, DType.FLOAT16):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {self.dtype}")
        return self
