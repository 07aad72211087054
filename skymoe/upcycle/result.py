"""What `skymoe upcycle` reports. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from skymoe.convert.measured import Receipt
from skymoe.convert.result import Planned, Written
from skymoe.spec.model import ModelSpec


@dataclass(frozen=True)
class UpcycleReport(Written):
    """What the conversion did.

    Attributes:
        method: how the experts were made.
        source_architecture, architecture: on disk, before and after.
        experts, top_k: of the new model.
        gate_norm: whether the gate is normalized.
        parameters, active_parameters: of the new model; the second is what one token uses.
        max_abs_dlogit, kl, exact, reason: the essence of the receipt.
        remarks: what the user should know.
        receipt: all of it, as in receipt.json.
    """

    method: str
    source_architecture: str
    architecture: str
    experts: int
    top_k: int
    gate_norm: bool
    parameters: int
    active_parameters: int
    max_abs_dlogit: float | None
    kl: float | None
    exact: bool
    reason: str
    remarks: tuple[str, ...]
    receipt: Receipt


@dataclass(frozen=True)
class PlannedUpcycle(Planned):
    """A dry run: what would be written.

    Attributes:
        out: where.
        method: how the experts would be made.
        source_architecture, architecture: on disk, before and after.
        experts, top_k: of the new model.
        parameters, active_parameters: of the new model.
        exact, reason: what the receipt would be held against.
        remarks: what the user should know.
        spec: of the new model.
    """

    out: Path
    method: str
    source_architecture: str
    architecture: str
    experts: int
    top_k: int
    parameters: int
    active_parameters: int
    exact: bool
    reason: str
    remarks: tuple[str, ...]
    spec: ModelSpec
