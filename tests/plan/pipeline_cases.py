"""Pipelines for the tests of the solver, and the answer that looks at every division."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations_with_replacement, product

import numpy as np
from hypothesis import strategies as st

from skymoe.plan.pipeline.loads import Load, peak_memory, stage_load
from skymoe.plan.pipeline.makespan import makespans
from skymoe.plan.pipeline.problem import End, Problem, Unit
from skymoe.plan.pipeline.schedule import key_of, order_of_key
from skymoe.plan.simulator import simulate
from skymoe.spec.layout import ScheduleKind


def amounts(most: int) -> st.SearchStrategy[float]:
    """Quarters: sums of them are exact, so equal is equal."""
    return st.integers(0, 4 * most).map(lambda number: number / 4)


@st.composite
def units(draw: st.DrawFn, count: int) -> tuple[Unit, ...]:
    """Equal or unequal units, whole layers or halves, in time and memory."""
    halves = draw(st.booleans())
    kinds = draw(st.integers(1, 3))
    made = [
        {
            "forward": draw(amounts(4)), "backward": draw(amounts(4)), "again": draw(st.none() | amounts(4)),
            "static": draw(amounts(2)), "activation": draw(amounts(5)), "checkpoint": draw(amounts(2)),
            "transient": draw(st.sampled_from([0.0, 0.0, 4.0])),
        }
        for _ in range(kinds)
    ]  # fmt: skip
    chosen = [draw(st.integers(0, kinds - 1)) for _ in range(count)]
    return tuple(Unit(layer=number // (1 + halves), **made[kind]) for number, kind in enumerate(chosen))


@st.composite
def problems(draw: st.DrawFn, most_units: int = 8, most_ranks: int = 4) -> Problem:
    """1F1B pipelines: with and without memory, hops, ends; fewer micro-batches than ranks too."""
    ranks = draw(st.integers(1, most_ranks))
    count = draw(st.integers(max(1, ranks - 2), most_units))
    ends = [
        End(
            forward=draw(amounts(3)), backward=draw(amounts(3)), static=draw(amounts(3)), activation=draw(amounts(2)),
            transient=draw(amounts(4)),
        )
        for _ in range(2)
    ]  # fmt: skip
    ends = [end if draw(st.integers(0, 3)) else End() for end in ends]
    return Problem(
        units=draw(units(count)),
        num_ranks=ranks,
        num_micro=draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 13, 20])),
        embedding=ends[0],
        head=ends[1],
        memory=draw(st.none() | amounts(60)),
        extra_alive=draw(st.sampled_from([0, 0, 0, 1, 3])),
        hop=draw(st.sampled_from([0.0, 0.0, 0.5, 2.5])),
        recompute=draw(st.sampled_from([True, True, False])),
        whole_layers=draw(st.sampled_from([False, False, True])),
    )


def divisions(problem: Problem) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Every split with every vector of layers run again."""
    count, last = len(problem.units), problem.num_stages - 1
    layers = [unit.layer for unit in problem.units]
    inner = [place for place in range(1, count) if not problem.whole_layers or layers[place] != layers[place - 1]]
    for cuts in combinations_with_replacement([0, *inner, count], last):
        places = (0, *cuts, count)
        sizes = tuple(end - start for start, end in zip(places, places[1:], strict=False))
        may_be_empty = (problem.embedding != End(), *(False for _ in sizes[1:-1]), problem.head != End())
        if last and any(not size and not may for size, may in zip(sizes, may_be_empty, strict=True)):
            continue
        most = [len(set(layers[start:end])) for start, end in zip(places, places[1:], strict=False)]
        for again in product(*(range(number + 1 if problem.recompute else 1) for number in most)):
            yield sizes, again


def best_makespan(problem: Problem, *, by_simulator: bool = False) -> float | None:
    """The fastest of all divisions that fit, each of them simulated; None when none fits."""
    fitting = []
    known: dict[tuple[int, int, int, int], Load] = {}
    for sizes, again in divisions(problem):
        loads, start = [], 0
        for stage, (size, count) in enumerate(zip(sizes, again, strict=True)):
            key = stage, start, size, count
            if key not in known:
                known[key] = stage_load(problem, stage, problem.units[start : start + size], count)
            loads.append(known[key])
            start += size
        if problem.memory is None or max(peak_memory(problem, loads)) <= problem.memory:
            fitting.append(loads)
    if not fitting:
        return None
    if by_simulator:
        return min(simulated(problem, loads) for loads in fitting)
    names = ("forward", "backward", "weight")
    columns = (np.array([[getattr(load, name) for load in loads] for loads in fitting]).T for name in names)
    return float(makespans(problem, *columns).min())


def simulated(problem: Problem, loads: list[Load]) -> float:
    """The makespan as plan/simulator.py has it."""
    order = order_of_key(key_of(problem))
    forward, backward = [load.forward for load in loads], [load.backward for load in loads]
    if problem.schedule is not ScheduleKind.ZERO_BUBBLE or problem.num_ranks == 1:
        return simulate(order, forward, backward, hop_s=problem.hop).span_s
    weight = [load.weight for load in loads]
    halves = [whole - part for whole, part in zip(backward, weight, strict=True)]
    return simulate(order, forward, halves, weight, hop_s=problem.hop).span_s


def plain(count: int, ranks: int, micro: int, **more: object) -> Problem:
    """Equal layers: forward 1, backward 2; an activation of 1, of which a tenth stays when a layer is run again."""
    unit = {"forward": 1.0, "backward": 2.0, "static": 1.0, "activation": 1.0, "checkpoint": 0.1}
    layers = tuple(Unit(layer=number, **unit) for number in range(count))
    return Problem(units=layers, num_ranks=ranks, num_micro=micro, **more)
