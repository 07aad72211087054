"""What `skymoe export` reports. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from skymoe.convert.measured import Receipt
from skymoe.convert.result import Planned, Written
from skymoe.export.config import Format


@dataclass(frozen=True)
class FoldedLayer:
    """How one router lost its normalization, measured on the fitted tokens.

    Attributes:
        layer: counted from 0.
        temperature: c: the folded logits are c times the raw ones, less their mean.
        true_low, true_median, true_high: what the normalization multiplies the raw logits by, lambda / (sigma + eps),
            for the tokens at 5, 50 and 95 %.
        mean_abs_dweight: mean |change| of a combine weight.
        kl: KL of the combine weights, mean nats per token.
        same_experts: part of the tokens that choose the same experts, with the folded weights as they are written.
    """

    layer: int
    temperature: float
    true_low: float
    true_median: float
    true_high: float
    mean_abs_dweight: float
    kl: float
    same_experts: float


@dataclass(frozen=True)
class Fold:
    """What the fold costs.

    Attributes:
        layers: every MoE layer.
        fit_tokens, held_out_tokens: of the text; the first were fitted on, the figures below are of the second.
        kl: KL(source || output), mean nats per token.
        perplexity_before, perplexity_after: of source and output.
        max_kl: what was accepted.
    """

    layers: tuple[FoldedLayer, ...]
    fit_tokens: int
    held_out_tokens: int
    kl: float
    perplexity_before: float
    perplexity_after: float
    max_kl: float


@dataclass(frozen=True)
class PlannedExport(Planned):
    """A dry run: what would be written.

    Attributes:
        format, source_architecture, architecture: what is asked for, and the names on disk before and after.
        adapters: what is changed without a change of the function.
        remarks: what the user should know.
        exact, reason: what the receipt will be held against.
    """

    format: Format
    source_architecture: str
    architecture: str
    adapters: tuple[str, ...]
    remarks: tuple[str, ...]
    exact: bool
    reason: str


@dataclass(frozen=True)
class ExportReport(Written):
    """What the export did.

    Attributes:
        format, source_architecture, architecture: what was asked for, and the names on disk before and after.
        adapters: what was changed without a change of the function.
        remarks: what the user should know.
        exact, reason, max_abs_dlogit, kl: the essence of the receipt.
        receipt: all of it, as in receipt.json.
        fold: what folding the gate normalization cost, None where there was nothing to fold.
    """

    format: Format
    source_architecture: str
    architecture: str
    adapters: tuple[str, ...]
    remarks: tuple[str, ...]
    exact: bool
    reason: str
    max_abs_dlogit: float | None
    kl: float | None
    receipt: Receipt
    fold: Fold | None
