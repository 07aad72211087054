from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skymoe.base.errors import ConfigError
from skymoe.data.interleave import MAX_PERIOD, Interleave, quotas_of


@pytest.mark.parametrize(
    ("weights", "quotas"),
    [
        ([7, 2, 1], (7, 2, 1)),
        ([0.7, 0.2, 0.1], (7, 2, 1)),
        ([70, 20, 10], (7, 2, 1)),
        ([3.0], (1,)),
        ([1 / 3, 1 / 3], (1, 1)),
        ([2.5, 1], (5, 2)),
        ([1e-3, 1e-3, 2e-3], (1, 1, 2)),
    ],
)
def test_ratios_of_small_numbers_are_exact(weights: list[float], quotas: tuple[int, ...]) -> None:
    assert quotas_of(weights) == quotas


def test_seven_two_one_in_every_ten() -> None:
    source, _ = Interleave([7, 2, 1]).locate(np.arange(1000))
    assert (np.stack([np.bincount(block, minlength=3) for block in source.reshape(100, 10)]) == [7, 2, 1]).all()


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_no_prefix_is_off_by_a_whole_sample(weights: list[int]) -> None:
    interleave = Interleave(weights)
    num = 2 * interleave.period
    source, _ = interleave.locate(np.arange(num))
    counts = np.cumsum(source[:, None] == np.arange(len(weights)), axis=0)
    ideal = np.arange(1, num + 1)[:, None] * np.array(weights) / sum(weights)
    assert np.abs(counts - ideal).max() < 1


@given(st.lists(st.floats(0.01, 1.0), min_size=2, max_size=6))
@settings(max_examples=15, deadline=None)
def test_any_weights_hold_up_to_the_stated_bound(weights: list[float]) -> None:
    interleave = Interleave(weights)
    num = 10_001
    source, _ = interleave.locate(np.arange(num))
    counts = np.cumsum(source[:, None] == np.arange(len(weights)), axis=0)
    steps = np.arange(1, num + 1)[:, None]
    assert (np.abs(counts - steps * np.array(weights) / sum(weights)) < 1 + steps / MAX_PERIOD).all()


def test_ordinals_count_the_samples_of_each_source() -> None:
    interleave = Interleave([5, 1, 3])
    seen = [0, 0, 0]
    for index in range(100):
        source, ordinal = interleave.locate(np.array([index]))
        assert ordinal[0] == seen[source[0]]
        seen[source[0]] += 1
        assert interleave.count(index + 1) == tuple(seen)
    far, ordinal = interleave.locate(np.array([9 * 10**15]))
    assert ordinal[0] == 10**15 * interleave.quotas[far[0]]


@pytest.mark.parametrize("weights", [[], [0], [1, -1], [float("nan")], [float("inf"), 1], [1e9, 1]])
def test_wrong_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="weight"):
        Interleave(weights)
