"""The list of divisions worth a look is complete: every division of small servers is tried."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from skymoe.plan.hardware.catalogue import parse_gpus
from skymoe.plan.hardware.gpu import Gpu, Precision
from skymoe.plan.serve.asked import Asked, read_asked
from skymoe.plan.serve.config import Objective, PlanServeConfig
from skymoe.plan.serve.frontier import KV_BLOCK, Fitted, frontier, layer_s, measured
from skymoe.plan.serve.model import Served
from skymoe.plan.serve.pieces import Wish, ends, filled, units_of
from skymoe.plan.serve.run import run
from skymoe.plan.serve.step import settings as stages_of
from skymoe.plan.serve.sweep import saturation
from skymoe.plan.shape import AttentionShape, FfnShape, LayerShape, ModelShape

HEADS, BLOCKS, WIDTH = 5, 6, 512


def small(kv_bytes: float) -> Served:
    attention = AttentionShape(num_heads=HEADS, num_kv_heads=HEADS, head_dim=128, value_dim=128)
    layer = LayerShape(attention=attention, ffn=FfnShape(inner=64 * BLOCKS))
    shape = ModelShape(name="small", hidden_size=WIDTH, vocab_size=64, layers=(layer,) * 4)
    return Served(shape=shape, weight_bytes=2.0, compute=Precision.BF16, kv_bytes=kv_bytes)


def every_division(served: Served, gpus: list[Gpu], reserve: list[float], wish: Wish) -> Iterator[Fitted]:
    """All that have room for `wish.kv_tokens`."""
    base, _ = ends(served, gpus, wish)
    units, members = units_of(served, base, wish), [[g] for g in range(len(gpus))]
    for heads, blocks in product(dealt(units.attention, len(gpus)), dealt(units.ffn, len(gpus))):
        found = measured(served, gpus, filled(served, base, units, members, heads, blocks), reserve)
        weights_fit = all(used <= gpu.memory for used, gpu in zip(found.weights, gpus, strict=True))
        if weights_fit and found.kv_tokens >= wish.kv_tokens:
            yield found


def dealt(total: int, parts: int) -> list[tuple[int, ...]]:
    return [sizes for sizes in product(range(total + 1), repeat=parts) if sum(sizes) == total]


@settings(max_examples=40, deadline=None)
@given(
    names=st.lists(st.sampled_from(["rtx4090", "rtx3090", "a100-80g", "l4"]), min_size=2, max_size=3),
    room=st.lists(st.floats(1.5e6, 8e6), min_size=3, max_size=3),
    kv_bytes=st.sampled_from([1.0, 2.0]),
    pages=st.integers(1, 8),
)
@example(names=["rtx4090"] * 3, room=[5652480.0] * 3, kv_bytes=1.0, pages=1)  # equal, and no remainder goes round
def test_no_division_is_both_faster_and_roomier(names, room, kv_bytes, pages):
    gpus = [replace(parse_gpus(name)[0], memory=size) for name, size in zip(names, room, strict=False)]
    served, reserve = small(kv_bytes), [0.0] * len(gpus)
    wish = Wish(kv_tokens=KV_BLOCK * pages, load_tokens=256, rotate=False)
    points = [(layer_s(served, gpus, one.shares, wish), one.kv_tokens) for one in frontier(served, gpus, reserve, wish)]
    tried = [
        (layer_s(served, gpus, one.shares, wish), one.kv_tokens)
        for one in every_division(served, gpus, reserve, wish)
    ]  # fmt: skip
    assert bool(points) == bool(tried)
    for seconds, tokens in tried:
        assert any(own <= seconds * (1 + 1e-9) and more >= tokens for own, more in points)
    for (fast, few), (slow, many) in zip(points, points[1:], strict=False):
        assert fast < slow and few < many
    for seconds, tokens in points:
        assert any(other == pytest.approx(seconds) and more == tokens for other, more in tried)


def rate(asked: Asked, gpus: list[Gpu], found: Fitted) -> float:
    (setting,) = stages_of(asked.served, gpus, found.shares, asked.engine)
    return saturation(setting, asked.workload, found.kv_tokens, asked.max_batch)


def test_the_throughput_of_four_4090s_and_three_3090s_is_the_best_of_the_list():
    config = PlanServeConfig(
        model="skywork-moe", gpus="4xrtx4090,3xrtx3090", weights="fp8", objective=Objective.THROUGHPUT
    )
    asked, report = read_asked(config), run(config)
    points = list(frontier(asked.served, asked.gpus, asked.reserve, asked.wish))
    assert len(points) > 1
    best = max(points, key=lambda one: rate(asked, list(asked.gpus), one))
    assert report.splits["heads"] == best.shares.heads and report.kv_tokens == best.kv_tokens
