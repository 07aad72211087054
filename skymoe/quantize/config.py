"""What the user asks of `skymoe quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from skymoe.base.config import Config
from skymoe.spec.quantization import Fp8Scheme


class QuantizeConfig(Config):
    """One conversion to FP8.

    Attributes:
        source: a Hugging Face directory, plain or FP8 already; with `dry_run` also the name of a preset.
        out: the directory to create; not needed with `dry_run`.
        scheme: how many weights share a scale.
        dry_run: plan and count, write nothing.
        receipt_tokens: length of each sequence on which the logits are compared with the source's; 0 compares nothing.
        seed: of the random ones among these tokens.
        max_shard_bytes: most bytes in one weight file.
        overwrite: replace an existing output directory.
    """

    source: str = Field(min_length=1)
    out: Path | None = None
    scheme: Fp8Scheme = Fp8Scheme.BLOCK
    dry_run: bool = False
    receipt_tokens: int = Field(default=64, ge=0, le=65536)
    seed: int = Field(default=0, ge=0)
    max_shard_bytes: int = Field(default=5_000_000_000, ge=1_000)
    overwrite: bool = False

    @model_validator(mode="after")
    def _out_is_given(self) -> Self:
        if self.out is None and not self.dry_run:
            raise ValueError("out is missing: name the directory to create, or ask for --dry-run")
        return self
