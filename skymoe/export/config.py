"""What the user asks of `skymoe export`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from skymoe.base.config import Config
from skymoe.base.dtype import DType


class Format(StrEnum):
    """What the output is read as: names of tensors and fields of config.json."""

    MIXTRAL = "mixtral"
    QWEN2_MOE = "qwen2_moe"
    QWEN3_MOE = "qwen3_moe"
    OLMOE = "olmoe"
    SKYMOE = "skymoe"  # carries everything, gate normalization too; brings its code along
    SKYWORK = "skywork"  # the names of the released Skywork-MoE (of Skywork-13B for a dense model)


class ExportConfig(Config):
    """One conversion to another format.

    Attributes:
        source: the model, a Hugging Face directory of any architecture we read.
        out: the directory to create.
        format: what the output is read as.
        dtype: of the output's weights; None keeps each tensor's (FP8 is decoded).
        fold_gate_norm: replace gate normalization by one temperature per layer. Approximate; needs `text`.
        text: a UTF-8 text file like what the model will read, for `fold_gate_norm`.
        max_kl: of the fold: the largest KL(source || output) on held-out text, mean nats per token, that is accepted.
        text_tokens: of the fold: how many tokens of the text are used at most; a quarter of them is held out.
        sequence_length: of the fold: tokens read together.
        dry_run: plan and count, write nothing.
        seed: of the receipt's tokens.
        receipt_tokens: length of each of the receipt's sequences (docs/receipt.md); 0 writes no measurements.
        max_shard_bytes: most bytes in one weight file.
        overwrite: replace an existing output directory.
    """

    source: Path
    out: Path
    format: Format
    dtype: DType | None = None
    fold_gate_norm: bool = False
    text: Path | None = None
    max_kl: float = Field(default=0.005, gt=0)
    text_tokens: int = Field(default=8192, ge=64, le=2**20)
    sequence_length: int = Field(default=512, ge=8, le=65536)
    dry_run: bool = False
    seed: int = Field(default=0, ge=0)
    receipt_tokens: int = Field(default=64, ge=0, le=65536)
    max_shard_bytes: int = Field(default=5_000_000_000, ge=1_000)
    overwrite: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.dtype is not None and self.dtype not in (DType.FLOAT32, DType.BFLOAT16, DType.FLOAT16):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {self.dtype}")
        if self.fold_gate_norm and self.text is None:
            raise ValueError("fold_gate_norm needs text: the temperatures are fitted on it (--text FILE)")
        if self.text is not None and not self.fold_gate_norm:
            raise ValueError("text is of use with fold_gate_norm only")
        return self
