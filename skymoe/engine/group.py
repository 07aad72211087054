"""The ranks of an engine: rank 0 in this process, the others started from here (interface; the inside follows).

with open_group(config) as ranks:
    logits_RV = ranks.run(step)
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from torch import Tensor

from skymoe.engine.config import EngineConfig
from skymoe.engine.step import StepPlan
from skymoe.spec.model import ModelSpec
from skymoe.spec.serving_plan import ServingPlan


class ServingGroup:
    """All ranks, as the engine sees them.

    Attributes:
        spec: the model.
        plan: the division.
        num_pages: of the key/value cache, on every rank.
        max_model_len: the most tokens of a request.
        weights, kv_dtype: number formats, such as "fp8" and "bf16".
    """

    spec: ModelSpec
    plan: ServingPlan
    num_pages: int
    max_model_len: int
    weights: str
    kv_dtype: str

    def run(self, step: StepPlan) -> Tensor:
        """One step on all ranks; fp32 logits (R, V) of the rows that want them, in the order of the step.

        Raises:
            MachineError: a rank is dead or does not answer; the message names it. The group is of no use any more.
        """
        raise NotImplementedError

    def expert_tokens(self) -> list[list[int]]:
        """Tokens per expert since the start, one row per MoE layer."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises MachineError when a rank has died; to be called now and then while there is nothing to run."""
        raise NotImplementedError

    def close(self) -> None:
        """End the followers; harmless twice."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_group(config: EngineConfig) -> ServingGroup:
    """Divide the model, start the followers, load.

    Raises:
        FormatError, ConfigError: the model or the division cannot be used.
        MachineError: a follower did not start, or memory is short.
    """
    raise NotImplementedError(config)
