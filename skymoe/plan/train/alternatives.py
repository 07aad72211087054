"""What else could be done on the best layouts: other ways of the tokens, a divided vocabulary, less to keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from skymoe.base.errors import ConfigError
from skymoe.plan.pipeline.solve import solve, with_vocabulary_parallel
from skymoe.plan.train.asked import Asked
from skymoe.plan.train.priced import price
from skymoe.plan.train.result import Alternative
from skymoe.plan.train.search import GB, Found, divide, found_of
from skymoe.plan.work import Recompute
from skymoe.spec.layout import DispatchMode


def other_dispatch(asked: Asked, found: Sequence[Found], *, layouts: int = 3) -> list[Found]:
    """The best layouts with tokens that reach their experts (or a dense model's norms) another way."""
    if asked.config.dispatch is not None:
        return []
    more = []
    modes = tuple(DispatchMode) if asked.spec.moe else (DispatchMode.REPLICATED, DispatchMode.GATHERED)
    for one in found[:layouts]:
        if one.candidate.tp * one.candidate.dp == 1 or (asked.spec.moe is None and one.candidate.tp == 1):
            continue
        for mode in modes:
            if mode is not one.candidate.dispatch:
                result = divide(price(asked, replace(one.candidate, dispatch=mode)))
                more += [result] if isinstance(result, Found) else []
    return more


def vocabulary_parallel(best: Found) -> Alternative | None:
    """Embedding and head divided over all ranks of the pipeline."""
    if best.candidate.pp == 1:
        return None
    try:
        answer = solve(with_vocabulary_parallel(best.priced.problem))
    except ConfigError:
        return None
    note = "embedding and head divided over all stages (Yeung et al., MLSys 2025); `skymoe train` does not run it"
    return _alternative("vocabulary parallelism", best, found_of(best.priced, answer), note)


def other_recompute(asked: Asked, best: Found) -> tuple[Alternative, ...]:
    """Where whole layers are run again: the activations of all layers instead."""
    if asked.config.recompute != "auto" or not any(best.answer.recompute):
        return ()
    other = divide(price(asked, best.candidate, level=Recompute.MOE_ACT))
    if not isinstance(other, Found) or other.step_s >= best.step_s:
        return ()
    note = "activations and norms of every layer run again, whole layers where that is not enough; no plan file"
    return (_alternative("--recompute moe_act", best, other, note),)


def _alternative(what: str, best: Found, other: Found, note: str) -> Alternative:
    work, reserve = other.priced.work, other.priced.sizes.reserve
    rate = work.step_tokens / other.step_s / work.division.world_size
    return Alternative(
        what=what, step_time_s=other.step_s, tokens_per_s_per_gpu=rate, gain=best.step_s / other.step_s - 1,
        memory_gb=tuple((used + reserve) / GB for used in other.answer.memory), note=note,
    )  # fmt: skip
