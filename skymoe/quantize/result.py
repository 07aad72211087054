"""What `skymoe quantize` reports. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from skymoe.convert.result import Planned, Written
from skymoe.spec.quantization import Fp8Scheme


@dataclass(frozen=True)
class TensorError:
    """How much rounding changed one matrix.

    Attributes:
        name: in the output.
        rms: root of the mean square of the error, divided by that of the weights.
        max: largest error of any weight, divided by the largest weight.
    """

    name: str
    rms: float
    max: float


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What is quantized and what is not.

    Attributes:
        scheme: which weights share a scale.
        style: whose format it is.
        weight_bytes: of all tensors, without file headers.
        weight_bytes_by_kind: "fp8", "scales", "kept".
        tensors_quantized, tensors_kept: of the source's tensors.
        unfit: matrices that stay as they are only because a side is no multiple of 128.
        rounded: tensors that are not FP8 and lose digits all the same: their type is wider than the embedding's.
        remarks: what the user should know.
    """

    scheme: Fp8Scheme
    style: str
    weight_bytes: int
    weight_bytes_by_kind: Mapping[str, int]
    tensors_quantized: int
    tensors_kept: int
    unfit: tuple[str, ...] = ()
    rounded: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PlannedQuantize(Planned, Counts):
    """A dry run: what would be written."""


@dataclass(frozen=True, kw_only=True)
class QuantizeReport(Written, Counts):
    """What was written, and what it cost.

    Attributes:
        mean_rms, max_rms: of the relative error of the matrices; audit.json has every one.
        worst: the matrices with the largest.
        max_abs_dlogit, kl: logits against the source's, see `Receipt`; receipt.json has all of it.
        loss_change: nats per token, of the receipt's text.
    """

    mean_rms: float
    max_rms: float
    worst: tuple[TensorError, ...] = field(default=())
    max_abs_dlogit: float | None = None
    kl: float | None = None
    loss_change: float | None = None
