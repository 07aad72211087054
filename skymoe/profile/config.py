"""What the user asks of `skymoe plan profile`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from skymoe.base.config import Config


class ProfileConfig(Config):
    """One model on one machine."""

    model: str = Field(min_length=1)
    """a Hugging Face model directory, or the name of a preset; its shape only, weights are random"""
    out: Path
    """the file to write; what is there is replaced when all is measured"""
    layers: int = Field(default=2, ge=1, le=64)
    """layers of each kind that are built and timed in a row; of a large model fewer than it has"""
    tokens: int = Field(default=128, ge=8, le=2**22)
    """of one sequence"""
    micro_batch: int = Field(default=1, ge=1, le=2**16)
    """sequences of a micro-batch"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """of matrix products; weights are fp32, as in training"""
    device: str = "cpu"
    """cpu, or cuda:0; cuda takes one GPU per rank"""
    ranks: int = Field(default=2, ge=1, le=64)
    """processes that work at the same time, as they do in training, and whose links are timed"""
    threads: int = Field(default=1, ge=1, le=1024)
    """of each process"""
    repeats: int = Field(default=7, ge=3, le=1000)
    """rounds; all that is timed is timed once per round"""
    gemms: int = Field(default=16, ge=0, le=512)
    """sizes of matrix products beside those of the model"""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """of weights and tokens"""
    timeout_s: float = Field(default=600.0, gt=0, le=86400)
    """how long ranks wait for each other"""
