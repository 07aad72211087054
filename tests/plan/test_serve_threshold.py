"""The division by thresholds is the best there is: every division of small cases is tried."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skymoe.plan.serve.threshold import Bin, Units, divide, minimax

SECONDS = st.sampled_from((0.4, 0.7, 1.0, 1.5, 2.0, 3.0))
BINS = st.lists(
    st.builds(
        Bin, count=st.integers(1, 3), attention_s=SECONDS, ffn_s=SECONDS, room=st.floats(0.0, 24.0, allow_nan=False)
    ),
    min_size=1,
    max_size=3,
)
UNITS = st.builds(
    Units,
    attention=st.integers(1, 6),
    ffn=st.integers(1, 6),
    attention_bytes=st.sampled_from((0.5, 1.0, 2.0)),
    ffn_bytes=st.sampled_from((0.7, 1.0, 3.0)),
    layers=st.sampled_from((1, 2, 5)),
)


def shares(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to deal `total` units to `parts`."""
    return (sizes for sizes in product(range(total + 1), repeat=parts) if sum(sizes) == total)


def slowest(sizes, bins, seconds) -> float:
    return max(-(-size // bin_.count) * each for size, bin_, each in zip(sizes, bins, seconds, strict=True))


def by_trying(bins: list[Bin], units: Units) -> float | None:
    """The fastest layer of all divisions that fit."""
    times = [
        slowest(a, bins, [b.attention_s for b in bins]) + slowest(f, bins, [b.ffn_s for b in bins])
        for a in shares(units.attention, len(bins))
        for f in shares(units.ffn, len(bins))
        if all(units.used(x, y, b.count) <= b.room for x, y, b in zip(a, f, bins, strict=True))
    ]
    return min(times, default=None)


@settings(max_examples=250, deadline=None)
@given(bins=BINS, units=UNITS)
def test_no_division_is_faster(bins, units):
    best, found = by_trying(bins, units), divide(bins, units)
    if best is None:
        assert found is None
        return
    assert found is not None
    assert sum(found.attention) == units.attention
    assert sum(found.ffn) == units.ffn
    for a, f, bin_ in zip(found.attention, found.ffn, bins, strict=True):
        assert units.used(a, f, bin_.count) <= bin_.room
    assert found.attention_s + found.ffn_s == pytest.approx(best)
    assert found.attention_s == pytest.approx(slowest(found.attention, bins, [b.attention_s for b in bins]))


@settings(max_examples=200, deadline=None)
@given(
    total=st.integers(0, 8),
    gpus=st.lists(st.tuples(SECONDS, st.integers(0, 8)), min_size=1, max_size=4),
)
def test_one_kind_of_unit_goes_where_it_ends_first(total, gpus):
    seconds, most = [s for s, _ in gpus], [cap for _, cap in gpus]
    found = minimax(total, seconds, most)
    allowed = [
        max(size * s for size, s in zip(sizes, seconds, strict=True))
        for sizes in shares(total, len(gpus))
        if all(size <= cap for size, cap in zip(sizes, most, strict=True))
    ]
    if not allowed:
        assert found is None
        return
    assert found is not None
    assert sum(found) == total
    assert all(size <= cap for size, cap in zip(found, most, strict=True))
    assert max(size * s for size, s in zip(found, seconds, strict=True)) == pytest.approx(min(allowed))


def test_the_division_of_skywork_moe():
    alike = Bin(count=1, attention_s=1.0, ffn_s=1.0, room=1e9)
    units = Units(attention=36, ffn=96, attention_bytes=1.0, ffn_bytes=1.0, layers=52)
    found = divide([alike] * 8, units)
    assert found is not None
    assert found.attention == (5, 5, 5, 5, 4, 4, 4, 4)
    assert found.ffn == (12,) * 8


def test_memory_moves_blocks_off_the_fast_gpu():
    fast = Bin(count=1, attention_s=1.0, ffn_s=1.0, room=5.0)
    slow = Bin(count=1, attention_s=2.0, ffn_s=2.0, room=100.0)
    units = Units(attention=3, ffn=6, attention_bytes=1.0, ffn_bytes=1.0, layers=1)
    found = divide([fast, slow], units)
    assert found is not None
    assert found.attention[0] + found.ffn[0] <= 5
    assert found.attention_s + found.ffn_s == by_trying([fast, slow], units)


def test_a_remainder_that_goes_round_needs_the_mean():
    units = Units(attention=36, ffn=8, attention_bytes=52.0, ffn_bytes=1.0, layers=52)
    assert units.used(36, 0, 8) == 4.5 * 52.0
    assert units.fullest(37, 8) == 241  # 37 x 52 / 8 = 240.5 heads of single layers


def test_nothing_fits():
    units = Units(attention=2, ffn=2, attention_bytes=1.0, ffn_bytes=1.0, layers=1)
    assert divide([Bin(count=1, attention_s=1.0, ffn_s=1.0, room=3.9)], units) is None
    assert divide([Bin(count=1, attention_s=1.0, ffn_s=1.0, room=4.0)], units) is not None
