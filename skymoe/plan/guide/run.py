"""Upcycle or train from scratch: Skywork's rule on the budgets asked, with the compute that the models really need.

    C = tokens x training FLOPs per token          C_MoE << C_dense: upcycle          C_MoE >= 2 C_dense: from scratch

The FLOPs are counted (spec/flops); without a model the report's 1.7 for top-2 stands in. Between the two bounds there
is no rule, and both sides' evidence is said. GPU hours come from a rate that is given, planned, or assumed.
"""

from __future__ import annotations

from skymoe.plan.guide import facts
from skymoe.plan.guide.compute import compute_of
from skymoe.plan.guide.config import GuideConfig
from skymoe.plan.guide.cost import cost_of
from skymoe.plan.guide.result import Compute, GuideReport, LearningRate, Verdict


def run(config: GuideConfig) -> GuideReport:
    """The report. Raises ConfigError or FormatError for a model, GPU or plan that cannot be used."""
    compute = compute_of(config)
    ratio = config.moe_tokens * compute.ratio / config.dense_tokens
    verdict = verdict_of(ratio)
    scale = config.dense_tokens / compute.ratio
    return GuideReport(
        verdict=verdict,
        summary=_summary(verdict, ratio),
        dense_tokens=config.dense_tokens,
        moe_tokens=config.moe_tokens,
        budget_ratio=ratio,
        upcycle_up_to_tokens=facts.UPCYCLE_UP_TO * scale,
        from_scratch_from_tokens=facts.FROM_SCRATCH_FROM * scale,
        compute=compute,
        cost=cost_of(config, compute),
        rule=facts.RULE,
        for_upcycling=facts.FOR_UPCYCLING,
        for_from_scratch=facts.FOR_FROM_SCRATCH,
        learning_rate=_learning_rate(config.dense_peak_lr),
        method=facts.DROP_HELPS if config.moe_tokens >= facts.DROP_FROM_TOKENS else facts.COPY,
        data=facts.DATA,
        watch=facts.WATCH,
        negative_results=facts.NEGATIVE,
        warnings=tuple(_warnings(config, compute)),
    )


def verdict_of(budget_ratio: float) -> Verdict:
    """What the rule says of C_MoE / C_dense."""
    if budget_ratio >= facts.FROM_SCRATCH_FROM:
        return Verdict.FROM_SCRATCH
    return Verdict.UPCYCLE if budget_ratio <= facts.UPCYCLE_UP_TO else Verdict.EITHER


def _summary(verdict: Verdict, ratio: float) -> str:
    said = f"the mixture's budget is {ratio:.3g} times the dense model's"
    return {
        Verdict.UPCYCLE: f"upcycle: {said}",
        Verdict.FROM_SCRATCH: f"train from scratch: {said}, at least {facts.FROM_SCRATCH_FROM:g} times",
        Verdict.EITHER: f"no rule decides: {said}; upcycling is ahead for most of the run and may be caught up with",
    }[verdict]


def _learning_rate(peak: float | None) -> LearningRate:
    low, high = 0.5, 1.0
    return LearningRate(
        low_times=low, high_times=high, low=None if peak is None else low * peak,
        high=None if peak is None else high * peak, facts=facts.LEARNING_RATE,
    )  # fmt: skip


def _warnings(config: GuideConfig, compute: Compute) -> list[str]:
    parameters = compute.dense_parameters
    if parameters is None or config.dense_tokens >= 20 * parameters:
        return []
    each = config.dense_tokens / parameters
    return [f"{each:.2g} dense tokens per parameter: compute-optimal training has 20 (Hoffmann et al. 2022)"]
