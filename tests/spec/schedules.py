"""Schedules made by hand, for tests that need passes in time."""

from __future__ import annotations

from collections.abc import Callable

from skymoe.spec.timeline import PassKind, Span

Seconds = Callable[[int, PassKind, int], float]


def one_f_one_b(num_ranks: int, num_micros: int, seconds: Seconds | None = None) -> list[Span]:
    """1F1B with one stage per rank: each pass as soon as its input is there and its rank is free.

    `seconds(rank, kind, micro)` is the length of a pass; without it a forward takes 1 s and a backward 2 s.
    """
    length: Seconds = seconds or (lambda rank, kind, micro: {"F": 1.0, "B": 2.0}[kind])
    orders = [_order(num_ranks - rank, num_micros) for rank in range(num_ranks)]
    ends: dict[tuple[PassKind, int, int], float] = {}
    free, spans = [0.0] * num_ranks, []
    while any(orders):
        for rank, order in enumerate(orders):
            if not order:
                continue
            kind, micro = order[0]
            source = (kind, rank - 1 if kind == "F" else rank + 1, micro)
            if 0 <= source[1] < num_ranks and source not in ends:
                continue
            start = max(free[rank], ends.get(source, 0.0))
            free[rank] = ends[kind, rank, micro] = start + length(rank, kind, micro)
            spans.append(Span(rank, rank, kind, micro, start, free[rank]))
            order.pop(0)
    return spans


def _order(warm_up: int, num_micros: int) -> list[tuple[PassKind, int]]:
    warm_up = min(num_micros, warm_up)
    order: list[tuple[PassKind, int]] = [("F", micro) for micro in range(warm_up)]
    for micro in range(num_micros):
        order.append(("B", micro))
        order += [("F", micro + warm_up)] if micro + warm_up < num_micros else []
    return order
