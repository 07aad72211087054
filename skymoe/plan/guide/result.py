"""What `skymoe plan guide` answers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from skymoe.plan.guide.facts import Fact


class Verdict(StrEnum):
    """What the rule says."""

    UPCYCLE = "upcycle"
    EITHER = "either"
    FROM_SCRATCH = "from_scratch"


@dataclass(frozen=True, kw_only=True)
class Compute:
    """What a token costs.

    Attributes:
        ratio: of the mixture of experts over the dense model, training FLOPs per token.
        origin: of the ratio.
        dense_flops, moe_flops: per token of a training step, causal attention; None without a model.
        dense_parameters, moe_parameters, active_parameters: None without a model.
    """

    ratio: float
    origin: str
    dense_flops: float | None = None
    moe_flops: float | None = None
    dense_parameters: int | None = None
    moe_parameters: int | None = None
    active_parameters: int | None = None


@dataclass(frozen=True, kw_only=True)
class Cost:
    """GPU hours.

    Attributes:
        tokens_per_s_per_gpu: the rate of training the mixture of experts.
        origin: of the rate.
        gpu_hours: of `moe_tokens`.
        days: on `gpus`; None when their number is not known.
        dense_gpu_hours: what the dense model has cost at the same utilisation: an estimate.
        from_scratch_gpu_hours: of the budget from which the rule says from scratch.
    """

    tokens_per_s_per_gpu: float
    origin: str
    gpu_hours: float
    days: float | None
    dense_gpu_hours: float
    from_scratch_gpu_hours: float


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """Peak of the second training, in multiples of the dense model's, and as numbers where that is known."""

    low_times: float
    high_times: float
    low: float | None
    high: float | None
    facts: tuple[Fact, ...]


@dataclass(frozen=True, kw_only=True)
class GuideReport:
    """The answer.

    Attributes:
        verdict, summary: in a word, in a sentence.
        budget_ratio: C_MoE / C_dense, in training FLOPs.
        upcycle_up_to_tokens, from_scratch_from_tokens: budgets of the mixture at which the rule changes its mind.
        method: of upcycling at this budget.
        warnings: what of the question is unusual.
    """

    verdict: Verdict
    summary: str
    dense_tokens: float
    moe_tokens: float
    budget_ratio: float
    upcycle_up_to_tokens: float
    from_scratch_from_tokens: float
    compute: Compute
    cost: Cost | None
    rule: tuple[Fact, ...]
    for_upcycling: tuple[Fact, ...]
    for_from_scratch: tuple[Fact, ...]
    learning_rate: LearningRate
    method: Fact
    data: Fact
    watch: tuple[Fact, ...]
    negative_results: tuple[Fact, ...]
    warnings: tuple[str, ...]
