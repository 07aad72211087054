"""The gain of one way to place the layers over another, same setup: what a planner is for.

Two figures of one source, measured on one machine, differ by their split only; so do our two predictions. Their
quotient does not care for how fast the machine is. Pairs: layers redistributed | uniform, and embedding and head
divided over all stages | uniform (Vocabulary Parallelism, table 5).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Final

from skymoe.plan.validate.cases import Case
from skymoe.plan.validate.result import Comparison

_NAMES: Final = {"redis": "gain", "vocab": "vocabulary_gain"}


def gains(cases: Sequence[Case], comparisons: Sequence[Comparison]) -> Iterator[Comparison]:
    """Gains of all pairs whose step times are compared; several runs of one kind are averaged."""
    times = {c.case: c for c in comparisons if c.quantity == "step_time"}
    setups: dict[tuple[object, ...], dict[str, list[Comparison]]] = defaultdict(lambda: defaultdict(list))
    for case in cases:
        kind = _kind(case)
        if kind and case.id in times:
            setups[_setup(case)][kind].append(times[case.id])
    for runs in setups.values():
        for kind, quantity in _NAMES.items():
            if "uniform" in runs and kind in runs:
                yield _gain(runs["uniform"], runs[kind], quantity)


def _kind(case: Case) -> str:
    words = case.text("parallel.layer_split").lower()
    if "vocabulary layers" in words:
        return "vocab"
    if "redis" in words:
        return "redis"
    return "uniform" if words == "uniform" or re.fullmatch(r"uniform\b.*base.*", words) else ""


def _setup(case: Case) -> tuple[object, ...]:
    """What must be equal."""
    paths = (
        "model.name", "model.num_layers", "model.hidden_size", "model.vocab_size", "cluster.gpu", "cluster.num_gpus",
        "parallel.tp", "parallel.pp", "parallel.dp", "batch.seq_len", "batch.micro_batch_size",
        "batch.global_batch_size", "batch.num_microbatches", "precision", "recompute",
    )  # fmt: skip
    return (case.group, *(repr(case.get(path)) for path in paths))


def _gain(before: Sequence[Comparison], after: Sequence[Comparison], quantity: str) -> Comparison:
    first = after[0]
    return Comparison(
        case=first.case, group=first.group, quantity=quantity, unit="x",
        predicted=fmean(c.predicted for c in before) / fmean(c.predicted for c in after),
        measured=fmean(c.measured for c in before) / fmean(c.measured for c in after),
        known=first.known, moe=first.moe, assumed=first.assumed,
    )  # fmt: skip


def wrong_signs(comparisons: Sequence[Comparison], *, margin: float = 0.01) -> list[Comparison]:
    """Gains whose prediction and measurement disagree on which is faster, both by more than `margin`."""
    return [c for c in comparisons if (c.predicted - 1) * (c.measured - 1) < 0 and _clear(c, margin)]


def _clear(comparison: Comparison, margin: float) -> bool:
    return min(abs(comparison.predicted - 1), abs(comparison.measured - 1)) > margin
