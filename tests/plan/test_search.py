"""The search over layouts: against trying everything, its bounds, and what it says when nothing fits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from skymoe.base.config import check_config
from skymoe.base.errors import ConfigError, FormatError
from skymoe.plan.pipeline.infeasible import smallest_memory
from skymoe.plan.pipeline.solve import solve, uniform
from skymoe.plan.train.asked import Asked, read_asked
from skymoe.plan.train.config import PlanTrainConfig
from skymoe.plan.train.priced import price, price_all
from skymoe.plan.train.search import found_of, search
from skymoe.plan.train.space import candidates, divisors, usual_sequences
from skymoe.spec.layout import ScheduleKind
from skymoe.spec.split import Split

SMALL: dict[str, Any] = {
    "model": "mixtral-8x7b",
    "gpus": 32,
    "gpu": "h100-80g",
    "seq": 4096,
    "global_batch_tokens": 2**20,
}


def ask(**options: Any) -> Asked:
    return read_asked(check_config(PlanTrainConfig, {**SMALL, **options}))


def test_all_legal_layouts_are_those_that_training_would_take() -> None:
    """Each candidate is a Layout that `skymoe train` accepts, uses all GPUs, and gives every replica as much."""
    asked = ask()
    found = candidates(asked.config, asked.spec, asked.cluster, asked.sequences)
    assert len(found) == len(set(found)) > 100
    for one in found:
        layout = one.layout(Split.remainder_first(2 * asked.spec.num_layers, one.num_stages))
        layout.check(asked.spec)
        assert layout.world_size == 32
        assert one.dp * one.micro_batch * one.num_micro == asked.sequences
        assert 8 % one.tp == 0
    assert {one.schedule for one in found} == set(ScheduleKind)
    assert {one.micro_batch for one in found} == {1, 2, 4}


def test_given_axes_are_kept() -> None:
    asked = ask(pp=4, expert="etp", micro_batch=2, schedule="interleaved", chunks=2)
    found = candidates(asked.config, asked.spec, asked.cluster, asked.sequences)
    assert found
    assert {(one.pp, str(one.expert), one.micro_batch, one.chunks) for one in found} == {(4, "etp", 2, 2)}


@pytest.mark.parametrize("number", [1, 2, 7, 48, 96, 1000, 1536, 1537])
def test_usual_batches_divide_over_the_replicas(number: int) -> None:
    sequences = usual_sequences(number)
    assert 512 <= sequences <= 2048
    assert any(sequences % replicas == 0 for replicas in divisors(number))
    odd = next(odd for odd in divisors(number)[::-1] if odd % 2)
    assert sequences % odd == 0


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zbv"])
def test_no_division_is_faster_than_its_bound(schedule: str) -> None:
    asked = ask(gpus=8, schedule=schedule)
    legal = candidates(asked.config, asked.spec, asked.cluster, asked.sequences)
    for priced in price_all(asked, legal[:: max(1, len(legal) // 6)]):
        unbound = replace(priced, problem=replace(priced.problem, memory=None))
        assert found_of(unbound, solve(unbound.problem)).step_s >= priced.bound_s * (1 - 1e-9)


def test_prices_that_are_shared_are_those_of_the_candidate() -> None:
    asked = ask(gpus=8)
    legal = candidates(asked.config, asked.spec, asked.cluster, asked.sequences)[::9]
    for shared, candidate in zip(price_all(asked, legal), legal, strict=True):
        alone = price(asked, candidate)
        assert (shared.prices, shared.sizes, shared.problem) == (alone.prices, alone.sizes, alone.problem)
        assert (shared.bound_s, shared.likely_s, shared.work) == (alone.bound_s, alone.likely_s, alone.work)


def test_the_best_is_the_best_of_all() -> None:
    """Against dividing every candidate; under 1F1B, where all of it is exact."""
    asked = ask(gpus=16, schedule="1f1b", top=2, whole_layers=True, micro_batch=1, global_batch_tokens=2**17)
    result = search(asked)
    every = []
    for priced in price_all(asked, candidates(asked.config, asked.spec, asked.cluster, asked.sequences)):
        if min(smallest_memory(priced.problem), max(uniform(priced.problem).memory)) <= (priced.problem.memory or 0.0):
            every.append(found_of(priced, solve(priced.problem)))
    assert result.found[0].step_s == pytest.approx(min(one.step_s for one in every))
    assert len(result.found) < len(every)
    assert len(result.found) + len(result.refused) == result.legal
    assert {one.why for one in result.refused} >= {"bound", "memory"}


def test_what_is_found_fits() -> None:
    asked = ask(memory=40.0, schedule="1f1b", global_batch_tokens=2**17, top=1, pp=4)
    result = search(asked)
    assert result.found
    assert max(one.memory_gb for one in result.found) <= 40.0
    assert any(any(one.answer.recompute) for one in result.found)


WRONG = {
    "no divisor": ({"pp": 7}, "--gpus 35 or --pp 8"),
    "other product": ({"pp": 4, "tp": 2, "dp": 2}, "--gpus 16"),
    "more stages than halves": ({"gpus": 4096, "pp": 128}, "--pp 64"),
    "more stages than layers": ({"gpus": 64, "pp": 64, "whole_layers": True}, "--pp 32, or stages that end within"),
    "more ranks than heads": ({"tp": 16, "nodes_of": 16}, "--tp 8"),
    "out of the node": ({"tp": 8, "nodes_of": 4}, "--tp 4, or --nodes-of 8"),
    "half a sequence": ({"global_batch_tokens": 5000}, "--global-batch-tokens 4096"),
    "batch": ({"pp": 1, "tp": 1, "global_batch_tokens": 48 * 4096}, "a step of 64 sequences, 262144 tokens"),
    "dense": ({"model": "llama-3-8b", "expert": "edp"}, "leave --expert out"),
    "gpu": ({"gpu": "h10-80"}, "h100-80g"),
    "model": ({"model": "mixtral-8x"}, "mixtral-8x7b"),
}


@pytest.mark.parametrize("case", WRONG)
def test_impossible_at_first_sight(case: str) -> None:
    """Exit code 2, and the smallest change that would do."""
    options, hint = WRONG[case]
    with pytest.raises((ConfigError, FormatError)) as told:
        ask(**options)
    assert hint in told.value.hint
    assert told.value.exit_code == 2


@pytest.mark.parametrize(("name", "value"), [("gpus", -4), ("gpus", 0), ("pp", -1), ("memory", -1.0), ("seq", 0)])
def test_numbers_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        ask(**{name: value})
