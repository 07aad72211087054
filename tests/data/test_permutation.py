from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skymoe.data.permutation import key_of, permute


def whole(size: int, key: int, epoch: int) -> list[int]:
    return permute(np.arange(size), size, key=key, epochs=np.full(size, epoch)).tolist()


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1), st.integers(0, 10**6))
@settings(max_examples=80, deadline=None)
def test_it_is_a_bijection(size: int, key: int, epoch: int) -> None:
    assert sorted(whole(size, key, epoch)) == list(range(size))


@pytest.mark.parametrize("size", range(1, 130))
def test_it_is_a_bijection_of_every_small_size(size: int) -> None:
    assert sorted(whole(size, 7, 3)) == list(range(size))


def test_positions_do_not_depend_on_their_company() -> None:
    size, epochs = 1013, np.arange(1013) % 5
    together = permute(np.arange(size), size, key=3, epochs=epochs)
    alone = [int(permute(np.array([i]), size, key=3, epochs=epochs[i : i + 1])[0]) for i in range(0, size, 50)]
    assert together[::50].tolist() == alone


def test_huge_sizes_stay_in_range() -> None:
    size = (1 << 62) - 57
    result = permute(np.array([0, 1, size - 1]), size, key=1, epochs=np.zeros(3, np.int64))
    assert len(set(result.tolist())) == 3 and all(0 <= int(r) < size for r in result)


def test_seeds_and_epochs_give_unrelated_orders() -> None:
    size = 5000
    orders = [whole(size, key_of("s", seed), epoch) for seed in range(3) for epoch in range(3)]
    for number, order in enumerate(orders):
        for other in [list(range(size)), *orders[:number]]:
            assert sum(a == b for a, b in zip(order, other, strict=True)) < 12  # one is expected by chance
            assert abs(np.corrcoef(order, other)[0, 1]) < 0.06


def test_every_position_reaches_every_place_equally_often() -> None:
    size, trials = 10, 4000
    results = np.array([whole(size, key_of(seed), 0) for seed in range(trials)])
    counts = np.stack([np.bincount(results[:, position], minlength=size) for position in range(size)])
    chi_square = ((counts - trials / size) ** 2 / (trials / size)).sum()
    assert chi_square < 150  # 81 degrees of freedom: 81 expected, deviation 13


def test_neighbours_part() -> None:
    order = np.array(whole(4096, 11, 0))
    assert len(set(np.diff(order).tolist())) > 3000


def test_the_order_is_the_same_for_ever() -> None:
    assert whole(7, 1, 0) == [4, 1, 5, 0, 6, 2, 3]
    assert key_of(0, "web", "ab") == 5584759636594192447
