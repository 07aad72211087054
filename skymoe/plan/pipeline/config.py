"""What the user asks of `skymoe plan pipeline`: a pipeline in abstract units of time and memory."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from skymoe.base.config import Config
from skymoe.base.errors import ConfigError, printable
from skymoe.plan.pipeline.check import MAX_PASSES, MAX_RANKS, MAX_UNITS
from skymoe.spec.layout import ScheduleKind

MAX_AMOUNT = 1e15
"""Of one unit; above any byte or nanosecond, and far enough below the largest float that no sum overflows."""
Amount = Annotated[float, Field(ge=0, le=MAX_AMOUNT)]
Amounts = Annotated[tuple[Amount, ...], Field(min_length=1, max_length=MAX_UNITS)]


class PipelineConfig(Config):
    """Units in order, and what they are divided over. A list with one item is for all units."""

    forward: Amounts
    """time of one micro-batch in each unit; as many as there are units"""
    backward: Amounts
    """the same for the backward pass, gradients of weights included"""
    weight: Amounts = (0.0,)
    """the part of `backward` that is gradients of weights; zbv moves it"""
    again: Amounts | None = None
    """added to the backward when a layer is run again; without it, its forward"""
    static: Amounts = (0.0,)
    """memory for good"""
    activation: Amounts = (0.0,)
    """memory per micro-batch between forward and backward"""
    checkpoint: Amounts = (0.0,)
    """memory kept instead when the layer is run again"""
    transient: Amounts = (0.0,)
    """memory while the unit runs"""
    units_per_layer: int = Field(default=1, ge=1, le=MAX_UNITS)
    """2: units are halves of layers, which are run again together"""
    whole_layers: bool = False
    """stages end at layers' ends only"""
    stages: int = Field(ge=1, le=MAX_RANKS)
    """ranks of the pipeline"""
    microbatches: int = Field(ge=1, le=MAX_PASSES)
    """per step"""
    embedding_forward: Amount = 0.0
    """time beside the units of the first stage"""
    embedding_backward: Amount = 0.0
    """time beside the units of the first stage"""
    embedding_static: Amount = 0.0
    """memory of the first stage for good"""
    head_forward: Amount = 0.0
    """time beside the units of the last stage"""
    head_backward: Amount = 0.0
    """time beside the units of the last stage"""
    head_static: Amount = 0.0
    """memory of the last stage for good"""
    head_activation: Amount = 0.0
    """memory of the last stage per micro-batch"""
    head_transient: Amount = 0.0
    """memory of the last stage while the head runs: logits"""
    memory: Amount | None = None
    """of a rank; without it, no limit"""
    hop: Amount = 0.0
    """time from rank to rank, one way"""
    schedule: ScheduleKind = ScheduleKind.ONE_F_ONE_B
    """1f1b, interleaved or zbv"""
    chunks: int | None = Field(default=None, ge=1, le=MAX_RANKS)
    """stages per rank; interleaved only, 2 without it"""
    recompute: bool = True
    """whether layers may be run again"""
    vocabulary_parallel: bool = False
    """divide embedding and head over all ranks"""


def read_amounts(text: str, name: str) -> list[str | float]:
    """`1,2x3,0.5` as 1, 2, 2, 2, 0.5; what is no number is left for the config to refuse.

    Raises:
        ConfigError: more than 4096 items, or a count that is none.
    """
    amounts: list[str | float] = []
    for item in text.split(","):
        value, times, count = item.strip().partition("x")
        if times and not (count.isdecimal() and len(count) <= 6 and int(count) > 0):
            raise ConfigError(f"{printable(item, 40)!r}: expected VALUE or VALUExCOUNT", where=name, hint="1x24")
        number = int(count) if times else 1
        if len(amounts) + number > MAX_UNITS:
            raise ConfigError(f"more than {MAX_UNITS} units", where=name)
        amounts += [_number(value)] * number
    return amounts


def _number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text[:40]
