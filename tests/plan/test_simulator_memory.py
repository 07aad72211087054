"""What is alive when: closed forms, by hand, and hops of all kinds."""

from __future__ import annotations

import pytest

from skymoe.plan.alive import Level, alive, memory_over_time, peak_alive, peak_memory
from skymoe.plan.orders import gpipe, interleaved, one_f_one_b, zbv
from skymoe.plan.simulator import makespan, simulate
from skymoe.plan.timeline import Timeline
from skymoe.spec.timeline import Span


@pytest.mark.parametrize(("pp", "num_micro"), [(1, 3), (4, 16), (5, 3)])
def test_alive_under_1f1b_and_gpipe(pp: int, num_micro: int) -> None:
    """min(P - s, m), and m."""
    ones = [1.0] * pp
    plain = simulate(one_f_one_b(pp, num_micro), ones, ones)
    assert peak_alive(plain) == tuple(min(pp - stage, num_micro) for stage in range(pp))
    assert alive(plain) == {rank: {rank: min(pp - rank, num_micro)} for rank in range(pp)}
    assert peak_alive(simulate(gpipe(pp, num_micro), ones, ones)) == (num_micro,) * pp


def test_alive_when_interleaved() -> None:
    """Rank 0 holds 2 (P - 1) + (V - 1) P + 1 chunks (Narayanan et al. 2021): 19 for P = 4, V = 4."""
    pp, chunks = 4, 4
    timeline = simulate(interleaved(pp, chunks, 16), [1.0] * 16, [1.0] * 16)
    peaks = peak_memory(timeline, [1.0] * 16)
    assert peaks == tuple(2 * (pp - 1 - rank) + (chunks - 1) * pp + 1 for rank in range(pp))
    assert sum(alive(timeline)[0].values()) >= 19


def test_zbv_holds_the_same_on_every_rank() -> None:
    """2 P stages' activations, those of 1f1b's first rank, on all ranks (Qi et al. 2024, section 6)."""
    halves = [0.5] * 8
    assert max(peak_memory(simulate(zbv(4, 12), halves, halves, halves), halves)) == pytest.approx(4.0)


def test_bytes_by_hand() -> None:
    """Two micro-batches of 10 bytes, 4 of them until the weights are done, 3 while a pass runs, 100 always."""
    spans = [
        Span(0, 5, "F", 0, 0.0, 1.0), Span(0, 5, "F", 1, 1.0, 2.0),
        Span(0, 5, "I", 0, 2.0, 3.0), Span(0, 5, "B", 1, 3.0, 5.0), Span(0, 5, "W", 0, 5.0, 6.0),
    ]  # fmt: skip
    levels = memory_over_time(Timeline.of(spans, 6.0), [10.0], [100.0], weight_bytes=[4.0], running_bytes=[3.0])[5]
    last = {level.at_s: level.size for level in levels}
    assert last == {0.0: 113.0, 1.0: 123.0, 2.0: 123.0, 3.0: 117.0, 5.0: 107.0, 6.0: 100.0}
    assert levels[-1] == Level(6.0, 100.0)
    assert max(level.size for level in levels) == 123.0


def test_gpipe_bubble() -> None:
    """(P - 1) / (m + P - 1), as 1f1b."""
    timeline = simulate(gpipe(4, 12), [1.0] * 4, [2.0] * 4)
    assert timeline.bubble == pytest.approx(3 / 15)


def test_hops_per_boundary() -> None:
    """A slow link in the middle, by hand: one micro-batch pays it twice."""
    ones = [1.0] * 3
    assert makespan(one_f_one_b(3, 1), ones, ones, hop_s=[0.5, 2.0]) == pytest.approx(6 + 2 * 2.5)
    assert makespan(one_f_one_b(3, 1), ones, ones, hop_s=[0.0, 0.0]) == makespan(one_f_one_b(3, 1), ones, ones)
    with pytest.raises(ValueError, match="3 stages have 2 boundaries, not 1"):
        makespan(one_f_one_b(3, 1), ones, ones, hop_s=[1.0])


def test_exposed_hops_hold_up_the_rank_that_sends() -> None:
    """Two ranks, two micro-batches, F = B = 1, hops of 1: by hand 8 when hidden, 9 when exposed."""
    ones = [1.0, 1.0]
    order = one_f_one_b(2, 2)
    hidden, exposed = simulate(order, ones, ones, hop_s=1.0), simulate(order, ones, ones, hop_s=1.0, exposed=True)
    starts = {(span.stage, span.kind, span.micro): span.start_s for span in exposed.spans}
    assert starts[0, "F", 1] == 2.0, "the first rank sends until then"
    assert starts[1, "F", 1] == 5.0, "the second rank has sent its gradient"
    assert (hidden.span_s, exposed.span_s) == (8.0, 9.0)
    assert makespan(order, ones, ones, hop_s=1.0, exposed=True) == exposed.span_s


def test_a_large_pipeline_is_complete() -> None:
    """32 stages, 256 micro-batches: bubble 31 / 287; `makespan` agrees with the drawing."""
    order = one_f_one_b(32, 256)
    timeline = simulate(order, [1.0] * 32, [2.0] * 32)
    assert len(timeline.spans) == 2 * 32 * 256
    assert timeline.bubble == pytest.approx(31 / 287)
    assert makespan(order, [1.0] * 32, [2.0] * 32) == timeline.span_s
    assert timeline.bubble_of_longest_rank == pytest.approx(31 / 287)
