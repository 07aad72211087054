"""What the user asks of `skymoe ckpt ls|verify|diff|reshard|export`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from skymoe.base.config import Config
from skymoe.base.dtype import DType
from skymoe.spec.layout import ExpertAxis, ScheduleKind


class LsConfig(Config):
    """List the generations of a run.

    Attributes:
        path: a run directory, or its `checkpoints` folder.
    """

    path: Path


class VerifyConfig(Config):
    """Read everything and compare it with its hashes.

    Attributes:
        path: a generation, a `checkpoints` folder, a run directory, or a model directory (form only: it has no hashes).
    """

    path: Path


class DiffConfig(Config):
    """Compare two states, tensor by tensor.

    Attributes:
        left: a generation, a run directory or `checkpoints` folder (its newest generation), or a model directory.
        right: the same.
        circumstances: keys of JSON documents that may differ between equal states, as shell patterns. Clocks, the
            recipe (which names the run directory) and the machine are not state; everything else is.
    """

    left: Path
    right: Path
    circumstances: tuple[str, ...] = (
        "*.seconds",
        "recipe",
        "torch",
        "threads",
        "transformers_version",
        "_name_or_path",
    )


class ReshardConfig(Config):
    """Write a generation again in the slices of another layout.

    A resume reads any layout from any other, so this is not needed for one; it makes one file of many, or spreads a
    state over the ranks that will read it.

    Attributes:
        source: a generation, or a run directory or `checkpoints` folder (its newest generation that is in order).
        out: the folder of generations to create (`RUN/checkpoints`).
        pp, tp, dp: ranks on each axis.
        expert: the expert axis.
        schedule: of the pipeline: which rank has which stages.
        chunks: stages per rank under `interleaved`.
        split: layers per stage; x.5 cuts a layer between attention and feed-forward. None divides evenly.
        zero_shards: divide what all dp ranks have alike among them, as ZeRO-1 does; otherwise the first one has it.
        overwrite: replace an existing folder.
    """

    source: Path
    out: Path
    pp: int = Field(default=1, ge=1)
    tp: int = Field(default=1, ge=1)
    dp: int = Field(default=1, ge=1)
    expert: ExpertAxis = ExpertAxis.EDP
    schedule: ScheduleKind = ScheduleKind.ONE_F_ONE_B
    chunks: int = Field(default=2, ge=2)
    split: tuple[float, ...] | None = None
    zero_shards: bool = True
    overwrite: bool = False


class ExportConfig(Config):
    """Make a Hugging Face model directory of a generation.

    Attributes:
        source: a generation, or a run directory or `checkpoints` folder (its newest intact generation).
        out: the directory to create.
        dtype: of the weights; None keeps that of the run.
        tokenizer: a directory whose tokenizer is copied; None takes the one that the run's recipe names.
        overwrite: replace an existing directory.
    """

    source: Path
    out: Path
    dtype: DType | None = None
    tokenizer: Path | None = None
    overwrite: bool = False
