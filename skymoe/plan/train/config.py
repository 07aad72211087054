"""What the user asks of `skymoe plan train`: a model, a machine, and which axes are fixed; all others are searched."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from skymoe.base.config import Config
from skymoe.plan.hardware.gpu import Precision
from skymoe.spec.layout import DispatchMode, ExpertAxis, ScheduleKind

MAX_GPUS = 1 << 20
_AXIS = Field(default=None, ge=1, le=MAX_GPUS)


class PlanTrainConfig(Config):
    """One model on so many GPUs. What is None is searched, or has the default that is said under it."""

    model: str = Field(min_length=1)
    """a preset such as `skywork-moe`, or a Hugging Face model directory (its weights are not read)"""
    gpus: int = Field(ge=1, le=MAX_GPUS)
    """how many there are; all are used"""
    gpu: str | None = Field(default=None, min_length=1, max_length=100)
    """type of the catalogue, such as `h100-80g`, or `cpu`; None for that of the profile, or `a800-80g`"""
    nodes_of: int | None = Field(default=None, ge=1, le=MAX_GPUS)
    """GPUs of a node; None for what is usual for the type"""
    memory: float | None = Field(default=None, gt=0, le=1e6)
    """GB (10^9 bytes) of a GPU that may be used; None for what the type has"""
    profile: Path | None = None
    """a file of `skymoe plan profile`: what was measured replaces the catalogue"""

    pp: int | None = _AXIS
    tp: int | None = _AXIS
    dp: int | None = _AXIS
    expert: ExpertAxis | None = None
    dispatch: DispatchMode | None = None
    """None: all-to-all for a mixture of experts, sequence parallelism for a dense model; the others are then tried on
    the best layouts"""
    schedule: ScheduleKind | None = None
    chunks: int | None = Field(default=None, ge=2, le=64)
    """stages per rank under `interleaved`; None tries 2 to 4"""
    recompute: Literal["auto", "none", "selective", "moe_act", "full"] = "auto"
    """what is run again in the backward pass: `none`, `full` (every layer), `auto` (as few layers of each stage as
    memory demands), or as auto beside `selective` (attention cores) or `moe_act` (activations) in all layers"""
    whole_layers: bool = False
    """stages end at layers' ends; otherwise also between an attention and its feed-forward"""

    seq: int | None = Field(default=None, ge=1, le=1 << 27)
    """tokens of a sequence; None for the model's context, at most 8192"""
    micro_batch: int | None = Field(default=None, ge=1, le=1 << 20)
    """sequences of a micro-batch; None tries 1, 2 and 4"""
    global_batch_tokens: int | None = Field(default=None, ge=1, le=1 << 40)
    """tokens of a step; None for about 1024 sequences, so many that the GPUs can share them"""

    precision: Precision | None = None
    """of the matrix products; None for bf16 where the GPU has it"""
    imbalance: float = Field(default=1.0, ge=1, le=1e3)
    """tokens of the fullest expert rank over the mean"""
    capacity: float | None = Field(default=None, gt=0, le=1e3)
    """tokens are padded and dropped to this capacity factor; None drops none"""

    vocabulary_parallel: bool = True
    """also say what dividing embedding and head over all stages would give (not run by `skymoe train`)"""
    top: int = Field(default=10, ge=1, le=1000)
    """how many runners-up are listed"""
    save: Path | None = None
    """write the plan file that `skymoe train` replays"""
    out: Path | None = None
    """a directory for the plan file, the report as JSON and as HTML, and what other programs read"""
    html: Path | None = None
    """write the report as one page that needs no network"""

    @model_validator(mode="after")
    def _chunks_belong_to_interleaved(self) -> Self:
        if self.chunks is not None and self.schedule not in (None, ScheduleKind.INTERLEAVED):
            raise ValueError(f"chunks belongs to the schedule interleaved, not {self.schedule}")
        return self
