"""What the user asks of `skymoe plan guide`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import BeforeValidator, Field, model_validator

from skymoe.base.config import Config
from skymoe.plan.guide.units import parse_count

Count = Annotated[float, BeforeValidator(parse_count)]


class GuideConfig(Config):
    """Two budgets; with a model also what a token costs, with a machine or a measured rate also GPU hours."""

    dense_tokens: Count
    """tokens that the dense model was trained on: 2T, 500B, 1.3e12"""
    moe_tokens: Count
    """tokens that the mixture of experts is to be trained on"""
    model: str | None = Field(default=None, min_length=1)
    """a preset or a Hugging Face model directory: the mixture of experts, or its dense parent with `experts`"""
    experts: int | None = Field(default=None, ge=2, le=1 << 16)
    """of a dense `model`: how many copies of its feed-forward"""
    top_k: int | None = Field(default=None, ge=1, le=1 << 16)
    """of a dense `model`: experts per token; None for 2"""
    sequence_length: int | None = Field(default=None, ge=1, le=1 << 27)
    """tokens of context for the FLOP count; None for the model's, at most 8192"""
    gpu: str | None = Field(default=None, min_length=1, max_length=100)
    """type of the catalogue; with `model` and `mfu` it gives a rate where none is measured"""
    gpus: int | None = Field(default=None, ge=1, le=1 << 20)
    """how many there are: GPU hours become days"""
    tokens_per_s_per_gpu: float | None = Field(default=None, gt=0, le=1e9)
    """measured or planned rate of training the mixture of experts"""
    layout_from: Path | None = None
    """a plan file of `skymoe plan train`: its expected rate is taken"""
    mfu: float | None = Field(default=None, gt=0, le=1)
    """assumed share of the GPU's peak, causal FLOPs, where no rate is given; None for 0.32"""
    dense_peak_lr: float | None = Field(default=None, gt=0, le=10)
    """peak learning rate of the dense model: the advice becomes a number"""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.experts or self.top_k) and self.model is None:
            raise ValueError("experts and top_k belong to a dense model: give model")
        if self.top_k and self.experts and self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} is more than the {self.experts} experts")
        if self.tokens_per_s_per_gpu is not None and self.layout_from is not None:
            raise ValueError("tokens_per_s_per_gpu and layout_from are two answers to one question: give one")
        if self.mfu is not None and (self.gpu is None or self.model is None):
            raise ValueError("mfu needs gpu and model")
        return self
