"""What is the same in every part of a run."""

from __future__ import annotations

from dataclasses import dataclass

from skymoe.ops.experts import ExpertsBackend
from skymoe.parallel.traffic import Traffic


@dataclass(frozen=True, kw_only=True)
class PartOptions:
    """What is the same in every part of a run.

    Attributes:
        num_tokens: N, tokens of a micro-batch.
        experts: how experts are multiplied.
        overlap: start the metadata of a dispatch before its payload.
        chunks: parts in which tokens are sent and multiplied.
        traffic: counts what dispatchers send, or None.
    """

    num_tokens: int
    experts: ExpertsBackend = ExpertsBackend.GROUPED
    overlap: bool = True
    chunks: int = 1
    traffic: Traffic | None = None
