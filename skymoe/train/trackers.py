"""Copies of the metrics for TensorBoard and Weights & Biases.

A tracker receives the very lines of `metrics.jsonl`, flattened to `train/loss`, `train/layers/drop_rate/3` and so
on. A missing package is told before training starts. After that a tracker that fails is switched off with one
warning: it never stops training. W&B's `offline` needs no account and asks nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from skymoe.base.errors import MissingExtraError
from skymoe.base.log import logger
from skymoe.train.upkeep_config import TrackConfig


class Tracker(Protocol):
    """Where metrics go besides the file."""

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Take the figures of one line."""

    def close(self) -> None:
        """Write out what is held."""


class Trackers:
    """All trackers of a run, each switched off by its first failure."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self._active = trackers

    def log(self, line: dict[str, Any]) -> None:
        """Pass on a metrics line; lines without numbers say nothing to a tracker."""
        if not self._active or line["kind"] not in ("train", "eval"):
            return
        scalars = flatten({key: value for key, value in line.items() if key not in ("kind", "step")}, line["kind"])
        for tracker in list(self._active):
            self._guarded(tracker, partial(tracker.log, line["step"], scalars))

    def close(self) -> None:
        """Close every tracker that still works."""
        for tracker in list(self._active):
            self._guarded(tracker, tracker.close)

    def _guarded(self, tracker: Tracker, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # a stranger's package, its network and its disk: none of them may stop training
            logger.warning("%s is switched off: %s", type(tracker).__name__, error)
            self._active.remove(tracker)


def flatten(value: Any, prefix: str) -> dict[str, float]:
    """Nested mappings and lists as slash-separated names; what is no number is left out."""
    if isinstance(value, bool) or value is None:
        return {}
    if isinstance(value, (int, float)):
        return {prefix: float(value)}
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    return {name: number for key, item in items for name, number in flatten(item, f"{prefix}/{key}").items()}


def open_trackers(config: TrackConfig, directory: Path, recipe: dict[str, Any], first_step: int) -> Trackers:
    """The trackers that the recipe asks for.

    Raises:
        MissingExtraError: a package is not installed.
    """
    wanted: list[Callable[[], Tracker]] = []
    if config.tensorboard:
        wanted.append(lambda: TensorBoard(directory / "tensorboard", first_step))
    if config.wandb != "off":
        wanted.append(lambda: WeightsAndBiases(config, directory, recipe))
    trackers = []
    for make in wanted:
        try:
            trackers.append(make())
        except MissingExtraError:
            raise
        except Exception as error:
            logger.warning("a tracker does not start and is switched off: %s", error)
    return Trackers(trackers)


class TensorBoard:
    """Event files; a resumed run hides the points it takes back."""

    def __init__(self, directory: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError("track.tensorboard", "track-tensorboard") from error
        self._writer = SummaryWriter(str(directory), purge_step=first_step + 1)

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Write one point per name."""
        for name, number in scalars.items():
            self._writer.add_scalar(name, number, step)

    def close(self) -> None:
        """Write out."""
        self._writer.close()


class WeightsAndBiases:
    """A W&B run named after the run directory."""

    def __init__(self, config: TrackConfig, directory: Path, recipe: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingExtraError("track.wandb", "track-wandb") from error
        self._run = wandb.init(
            project=config.project,
            name=directory.name,
            dir=str(directory),
            mode=config.wandb,
            config=recipe,
            reinit=True,
        )

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Send one point per name."""
        self._run.log(scalars, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()
