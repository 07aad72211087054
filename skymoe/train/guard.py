"""The guard: whether this step's loss and gradient may touch the weights.

It is asked once per step, after the backward pass and before the optimizer, so a bad batch never reaches the weights:

    not finite      the loss or the gradient norm is NaN or infinite
    spike           the loss is more than sigma standard deviations above the mean of the last good steps

The verdict is one of the actions of the recipe. *skip* leaves the weights and passes over the batch; *rollback*
returns to the last checkpoint generation and passes over every batch up to and including the bad one (replaying it
would end the same way); *raise* stops. More than `max_consecutive` bad steps in a row, or as many rollbacks to one
generation, raise whatever the action: something is broken that passing over data does not mend. All counts are
training state and are saved.

The loss window holds good steps only, so that a spike cannot widen its own tolerance.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from skymoe.base.errors import TrainingError
from skymoe.train.upkeep_config import GuardConfig


class Action(StrEnum):
    """What to do with a step."""

    ACCEPT = "accept"
    SKIP = "skip"
    ROLLBACK = "rollback"
    RAISE = "raise"


@dataclass(frozen=True)
class Verdict:
    """The decision, and why when it is not to accept."""

    action: Action
    reason: str = ""


@dataclass
class Guard:
    """Statistics of recent steps and the rule over them.

    Attributes:
        config: the actions and thresholds.
        losses: the last good losses, nats per token.
        consecutive: bad steps in a row.
        rollbacks: bad steps since the last save that were rolled back.
        skipped: batches passed over in all.
    """

    config: GuardConfig
    losses: deque[float] = field(init=False)
    consecutive: int = 0
    rollbacks: int = 0
    skipped: int = 0

    def __post_init__(self) -> None:
        self.losses = deque(maxlen=self.config.spike_window)

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        """Decide about one step and remember it."""
        verdict = self._verdict(loss, grad_norm)
        if verdict.action is Action.ACCEPT:
            self.losses.append(loss)
            self.consecutive = 0
            return verdict
        self.consecutive += 1
        self.skipped += 1
        self.rollbacks += verdict.action is Action.ROLLBACK
        if max(self.consecutive, self.rollbacks) > self.config.max_consecutive:
            return Verdict(Action.RAISE, f"{verdict.reason}; more than guard.max_consecutive bad steps")
        return verdict

    def _verdict(self, loss: float, grad_norm: float) -> Verdict:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return Verdict(Action(self.config.non_finite), f"not finite: loss {loss}, gradient norm {grad_norm}")
        if self.config.spike != "ignore" and len(self.losses) == self.config.spike_window:
            limit = self.limit()
            if loss > limit:
                return Verdict(Action(self.config.spike), f"spike: loss {loss:.4f} is above {limit:.4f}")
        return Verdict(Action.ACCEPT)

    def limit(self) -> float:
        """Mean plus sigma standard deviations of the window; the deviation is at least a thousandth of the mean."""
        mean = math.fsum(self.losses) / len(self.losses)
        variance = math.fsum((loss - mean) ** 2 for loss in self.losses) / len(self.losses)
        return mean + self.config.spike_sigma * max(math.sqrt(variance), 1e-3 * abs(mean))

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        counts = {"consecutive": self.consecutive, "rollbacks": self.rollbacks, "skipped": self.skipped}
        return {"losses": list(self.losses), **counts}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`; a shorter window than the saved one keeps the latest."""
        self.losses = deque(state["losses"], maxlen=self.config.spike_window)
        self.consecutive, self.rollbacks, self.skipped = state["consecutive"], state["rollbacks"], state["skipped"]


def stop_reason(verdict: Verdict, step: int) -> TrainingError:
    """The error that ends the run."""
    return TrainingError(
        f"training stopped at step {step}: {verdict.reason}",
        why="the weights are those of the last good step; nothing bad was written",
        hint="lower optimizer.lr or optimizer.clip, look at the data of this step, or set guard.non_finite=rollback",
    )
