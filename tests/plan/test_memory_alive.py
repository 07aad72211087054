"""How many micro-batches are alive, against the formulas of papers and against longer steps."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skymoe.plan.memory.alive import alive_counts, vocabulary_alive, worst_moments
from skymoe.plan.orders import interleaved, one_f_one_b, zbv
from skymoe.spec.layout import ScheduleKind


@pytest.mark.parametrize(("pp", "micro"), [(1, 3), (2, 1), (4, 9), (5, 3)])
def test_alive_1f1b(pp: int, micro: int) -> None:
    counts = alive_counts(ScheduleKind.ONE_F_ONE_B, pp, pp, micro)
    assert counts == tuple(worst_moments(tasks) for tasks in one_f_one_b(pp, micro))
    assert counts == tuple(((min(pp - rank, micro),),) for rank in range(pp))


@given(pp=st.integers(2, 6), chunks=st.integers(2, 4), rounds=st.integers(1, 6))
@settings(deadline=None)
def test_alive_interleaved(pp: int, chunks: int, rounds: int) -> None:
    """2 (P - s - 1) + (V - 1) P + 1 chunks, as many as there are; the same for any number of micro-batches above."""
    counts = alive_counts(ScheduleKind.INTERLEAVED, pp, pp * chunks, rounds * pp)
    for rank, moments in enumerate(counts):
        most = min(2 * (pp - rank - 1) + (chunks - 1) * pp + 1, chunks * rounds * pp)
        assert max(sum(moment) for moment in moments) == most
    longer = [worst_moments(tasks) for tasks in interleaved(pp, chunks, (rounds + 3) * pp)]
    assert list(alive_counts(ScheduleKind.INTERLEAVED, pp, pp * chunks, (rounds + 3) * pp)) == longer


@pytest.mark.parametrize(("pp", "chunks", "micro"), [(2, 2, 3), (3, 2, 5), (3, 3, 8), (4, 2, 6), (12, 2, 16)])
def test_alive_interleaved_with_rounds_longer_than_the_pipeline(pp: int, chunks: int, micro: int) -> None:
    """Micro-batches that are no multiple of the ranks go in larger rounds, and more chunks are alive."""
    order = interleaved(pp, chunks, micro)
    expected = tuple(worst_moments(tasks) for tasks in order)
    assert alive_counts(ScheduleKind.INTERLEAVED, pp, pp * chunks, micro) == expected


@given(pp=st.integers(2, 6), extra=st.integers(0, 30))
@settings(deadline=None)
def test_alive_zbv_is_settled_after_three_rounds(pp: int, extra: int) -> None:
    kind = ScheduleKind.ZERO_BUBBLE
    moments = [worst_moments(tasks) for tasks in zbv(pp, 3 * pp + extra)]
    assert list(alive_counts(kind, pp, 2 * pp, 3 * pp + extra)) == moments


def test_alive_zbv() -> None:
    """Zero bubble in a V: every rank has at most 2 P half-stages alive, as 1F1B's first rank (Qi et al. 2024, 6)."""
    counts = alive_counts(ScheduleKind.ZERO_BUBBLE, 4, 8, 16)
    assert [max(sum(moment) for moment in moments) for moments in counts] == [8, 8, 8, 8]


def test_alive_with_a_divided_vocabulary() -> None:
    assert vocabulary_alive(4, 64) == (5, 4, 3, 2) and vocabulary_alive(4, 64, barriers=2) == (6, 5, 4, 3)
    assert vocabulary_alive(4, 3) == (3, 3, 3, 2)
