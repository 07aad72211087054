"""What else could be done on the best layouts: other ways of the tokens, a divided vocabulary, less to keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from skymoe.plan.pipeline.solve import with_vocabulary_parallel
from skymoe.plan.train.asked import Asked
from skymoe.plan.train.priced import price
from skymoe.plan.train.result import Alternative
from skymoe.plan.train.search import GB, Found, divide, search
from skymoe.plan.work import Recompute
from skymoe.spec.layout import DispatchMode, ScheduleKind


def other_dispatch(asked: Asked, best: Found) -> list[Found]:
    """The best layout with tokens that reach their experts (or a dense model's norms) in another way."""
    moe, own = asked.spec.moe is not None, best.candidate
    if asked.config.dispatch is not None or own.tp * (own.dp if moe else 1) == 1:
        return []
    modes = tuple(DispatchMode) if moe else (DispatchMode.REPLICATED, DispatchMode.GATHERED)
    changed = (replace(own, dispatch=mode) for mode in modes if mode is not own.dispatch)
    return [result for one in changed if isinstance(result := divide(price(asked, one)), Found)]


def ways_of_tokens(best: Found, found: Sequence[Found]) -> tuple[Alternative, ...]:
    """The same layout with the other ways, as far as they fit."""
    notes = {
        DispatchMode.REPLICATED: "every rank of the group has all tokens",
        DispatchMode.GATHERED: "tokens are gathered and scattered",
        DispatchMode.ALL_TO_ALL: "tokens go to their experts' ranks only",
    }
    return tuple(
        _alternative(f"--dispatch {one.candidate.dispatch}", best, one, notes[one.candidate.dispatch])
        for one in found
        if one is not best
    )


def portable(asked: Asked, best: Found) -> Found | None:
    """The best layout with whole layers under 1F1B, which any program for training runs; None where `best` is that."""
    own = best.answer.stages.sizes
    if best.candidate.schedule is ScheduleKind.ONE_F_ONE_B and not any(size % 2 for size in own):
        return None
    plain = asked.config.replace(schedule=ScheduleKind.ONE_F_ONE_B, chunks=None, whole_layers=True)
    found = search(replace(asked, config=plain), top=1).found
    return found[0] if found else None


def vocabulary_parallel(best: Found) -> Alternative | None:
    """Embedding and head divided over all ranks of the pipeline."""
    if best.candidate.pp == 1:
        return None
    divided = divide(replace(best.priced, problem=with_vocabulary_parallel(best.priced.problem)))
    if not isinstance(divided, Found):
        return None
    note = "embedding and head divided over all stages (Yeung et al., MLSys 2025); `skymoe train` does not run it"
    return _alternative("vocabulary parallelism", best, divided, note)


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
