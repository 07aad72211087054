"""Job: the parts of a running training, wired once by start.py and driven by loop.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from skymoe.data.sampler import Mixture
from skymoe.parallel.heartbeat import Heartbeat
from skymoe.parallel.mesh import Mesh
from skymoe.parallel.stragglers import StepTimes
from skymoe.train.config import TrainConfig
from skymoe.train.evaluate import Held
from skymoe.train.metrics import MetricsLog
from skymoe.train.objective import Objective
from skymoe.train.state import TrainState
from skymoe.train.throughput import Machine
from skymoe.train.trackers import Trackers


@dataclass(frozen=True)
class Job:
    """Everything a step needs; only `state` changes.

    Attributes:
        config: the recipe.
        state: what a checkpoint holds.
        objective: what is minimised.
        mixture: the training data.
        held: the held-out data.
        machine: FLOP counts and peak.
        device: where the model is.
        metrics, trackers: where figures go.
        identity: recipe, model and data as plain data, kept in every generation.
        resumed_from: the step at which this call began, None for a fresh run.
        heart: told of what this rank is doing.
        mesh: where this rank stands; None on one process.
        times: exchanges busy seconds between ranks; None on one process.
    """

    config: TrainConfig
    state: TrainState
    objective: Objective
    mixture: Mixture
    held: Held
    machine: Machine
    device: torch.device
    metrics: MetricsLog
    trackers: Trackers
    identity: dict[str, Any]
    resumed_from: int | None
    heart: Heartbeat
    mesh: Mesh | None = None
    times: StepTimes | None = None

    @property
    def is_chief(self) -> bool:
        """Whether this rank writes the record of the run."""
        return self.mesh is None or self.mesh.rank == 0

    def phase(self, name: str, *, waits: bool = False) -> None:
        """This rank turns to `name`; `waits` where others decide when it ends."""
        self.heart.phase(name, self.state.counters.step, waits=waits)

    @property
    def checkpoints(self) -> Path:
        """Directory of the generations."""
        return self.config.run.dir / "checkpoints"

    def record(self, line: dict[str, Any]) -> None:
        """One line of metrics, to the file and to the trackers."""
        self.metrics.write(line)
        self.trackers.log(line)

    def event(self, event: str, **detail: Any) -> None:
        """Something that happened at this step."""
        self.record({"kind": "event", "step": self.state.counters.step, "event": event, "detail": detail})
