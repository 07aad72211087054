"""The sections of a recipe that decide no weight of a good run: what is saved, measured, guarded and reported."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from skymoe.base.config import Config


class CheckpointConfig(Config):
    """Checkpoint generations.

    Attributes:
        every: steps between saves; 0 saves only at the end and on a signal.
        keep: generations kept.
        on_save_error: `warn` goes on training when a save fails (no space), the previous generation being whole;
            `abort` stops.
        asynchronous: on many ranks, copy the state and write it while training goes on; one save at a time.
    """

    every: int = Field(default=500, ge=0)
    keep: int = Field(default=3, ge=1)
    on_save_error: Literal["warn", "abort"] = "warn"
    asynchronous: bool = False


class EvaluateConfig(Config):
    """Evaluation in the loop.

    Attributes:
        every: steps between evaluations; 0 evaluates only after the last step.
        windows: sequences per domain, the same ones each time; 0 reads each domain to its end.
        batch: sequences per forward; None takes the training micro-batch, which is always taken on many ranks.
        at_start: evaluate before the first step too.
    """

    every: int = Field(default=500, ge=0)
    windows: int = Field(default=64, ge=0)
    batch: int | None = Field(default=None, ge=1)
    at_start: bool = True


class GuardConfig(Config):
    """What happens to a step whose loss or gradient is not to be trusted. Decided before the weights are touched.

    Attributes:
        non_finite: on NaN or infinity: `skip` the update, `rollback` to the last generation and pass over the batch, or
            `raise`.
        spike: the same on a loss spike; `ignore` turns the test off.
        spike_sigma: a spike is a loss this many standard deviations above the mean of the window.
        spike_window: good steps in the window; no test before it is full.
        max_consecutive: bad steps in a row after which training raises.
    """

    non_finite: Literal["skip", "rollback", "raise"] = "skip"
    spike: Literal["ignore", "skip", "rollback", "raise"] = "skip"
    spike_sigma: float = Field(default=6.0, gt=0)
    spike_window: int = Field(default=128, ge=2)
    max_consecutive: int = Field(default=10, ge=1)


class TrackConfig(Config):
    """Copies of the metrics elsewhere; `metrics.jsonl` stays the source of truth.

    Attributes:
        tensorboard: write event files to `run.dir/tensorboard` (extra `track-tensorboard`).
        wandb: Weights & Biases: `off`, `offline` (no account) or `online` (extra `track-wandb`).
        project: W&B project.
    """

    tensorboard: bool = False
    wandb: Literal["off", "offline", "online"] = "off"
    project: str = "skymoe"


class LogConfig(Config):
    """Metrics.

    Attributes:
        every: steps between lines of metrics. Gate statistics are computed only then.
    """

    every: int = Field(default=10, ge=1)
