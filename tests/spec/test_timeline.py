"""Busy and idle time of hand-made schedules, and what the record keeps of them."""

from __future__ import annotations

import json

import pytest
from spec.schedules import one_f_one_b

from skymoe.base.errors import FormatError
from skymoe.spec.layout import Layout, ScheduleKind
from skymoe.spec.split import Split
from skymoe.spec.timeline import Span, bubble_fraction, read_spans, summarize, timeline_record


@pytest.mark.parametrize(("ranks", "micros"), [(1, 3), (2, 2), (3, 5), (4, 7)])
def test_the_bubble_of_1f1b_is_the_known_one(ranks: int, micros: int):
    times = summarize(one_f_one_b(ranks, micros))
    assert bubble_fraction(times) == pytest.approx((ranks - 1) / (ranks - 1 + micros))
    assert [entry.busy_s for entry in times] == [pytest.approx(3.0 * micros)] * ranks
    assert all(entry.busy_s + entry.idle_s == pytest.approx(entry.span_s) for entry in times)


def test_a_rank_with_two_stages_is_idle_once():
    """Stages 0 and 3 on rank 0, 1 and 2 on rank 1, as in zbv; a gap belongs to the pass that ends it."""
    spans = [
        Span(0, 0, "F", 0, 0.0, 1.0), Span(1, 1, "F", 0, 1.0, 2.0), Span(2, 1, "F", 0, 2.0, 3.0),
        Span(3, 0, "F", 0, 3.0, 4.0), Span(3, 0, "B", 0, 4.0, 5.0), Span(3, 0, "W", 0, 5.0, 5.5),
        Span(2, 1, "B", 0, 5.0, 6.0),
    ]  # fmt: skip
    times = {entry.stage: entry for entry in summarize(spans)}
    assert [times[stage].rank for stage in range(4)] == [0, 1, 1, 0]
    assert [times[stage].busy_s for stage in range(4)] == [1.0, 1.0, 2.0, 2.5]
    assert [times[stage].idle_s for stage in range(4)] == [0.0, 1.0, 2.0, 2.0 + 0.5]
    assert bubble_fraction(list(times.values())) == pytest.approx(5.5 / 12)


def test_passes_that_overlap_on_a_rank_are_not_counted_twice():
    times = summarize([Span(0, 0, "B", 0, 0.0, 4.0), Span(0, 0, "W", 0, 1.0, 3.0), Span(0, 0, "F", 1, 3.0, 5.0)])
    assert times[0].busy_s == 5.0 and times[0].idle_s == 0.0


def test_nothing_is_no_bubble():
    assert summarize([]) == [] and bubble_fraction([]) == 0.0


def test_a_replica_that_waits_shows():
    """Two data-parallel ranks of one stage: the faster one is idle at the end."""
    times = summarize([Span(0, 0, "F", 0, 0.0, 4.0), Span(0, 1, "F", 0, 0.0, 3.0)])
    assert [(entry.rank, entry.busy_s, entry.idle_s) for entry in times] == [(0, 4.0, 0.0), (1, 3.0, 1.0)]


def test_the_record_goes_through_json_and_back():
    layout = Layout(pp=3, stages=Split((5, 5, 4)), recompute=(3, 1, 0))
    spans, planned = one_f_one_b(3, 4), one_f_one_b(3, 4, lambda rank, kind, micro: 1.0 if kind == "F" else 1.5)
    record = json.loads(json.dumps(timeline_record(layout, spans, step=20, planned=planned)))
    assert (record["kind"], record["step"], record["world_size"]) == ("timeline", 20, 3)
    assert record["layout"]["split"] == [2.5, 2.5, 2.0] and record["layout"]["schedule"] == "1f1b"
    assert record["stages"][0] == {
        "stage": 0, "rank": 0, "layers": 2.5, "recompute": 3, "busy_s": 12.0, "idle_s": 6.0,
    }  # fmt: skip
    assert sorted(read_spans(record["spans"])) == sorted(spans)
    assert sorted(read_spans(record["planned_spans"])) == sorted(planned)
    assert record["bubble"] == pytest.approx(1 / 3)
    assert [entry["busy_s"] for entry in record["planned_stages"]] == [10.0] * 3


def test_waiting_after_the_last_pass_is_idle_time():
    """Until the end of the step, which the clock knows and the passes do not."""
    spans = [Span(0, 0, "F", 0, 1.0, 2.0), Span(0, 0, "I", 0, 2.0, 3.0), Span(0, 0, "W", 0, 3.0, 4.0)]
    (times,) = summarize(spans, 5.0)
    assert (times.busy_s, times.idle_s, times.span_s) == (3.0, 2.0, 5.0)


def test_a_large_world_keeps_one_replica_and_a_long_step_its_first_micro_batches():
    layout = Layout(pp=2, dp=20, tp=2, stages=Split((2, 2)), schedule=ScheduleKind.ONE_F_ONE_B)
    spans = [
        Span(rank // 40, rank, kind, micro, micro + (kind == "B") / 2, micro + (kind == "B") / 2 + 0.5)
        for rank in range(80)
        for micro in range(3000)
        for kind in ("F", "B")
    ]  # fmt: skip
    record = timeline_record(layout, spans, step=1)
    assert [entry["rank"] for entry in record["stages"]] == [0, 40]
    assert len(record["spans"]) == 1024 and {row[3] for row in record["spans"]} == set(range(256))
    assert record["stages"][0]["busy_s"] == pytest.approx(3000)  # of all passes, drawn or not


@pytest.mark.parametrize(
    "row",
    [
        "F", [0, 0, "F", 0, 1.0], [0, 0, "X", 0, 0.0, 1.0], [0, 0, "F", 0, 2.0, 1.0], [-1, 0, "F", 0, 0.0, 1.0],
        [0, True, "F", 0, 0.0, 1.0], [0, 0, "F", 0, float("nan"), 1.0], [0, 0, "F", 0, 0.0, float("inf")],
        [0, 0, ["F"], 0, 0.0, 1.0], [0.5, 0, "F", 0, 0.0, 1.0], [0, 0, "F", 0, None, 1.0],
    ],
)  # fmt: skip
def test_rows_that_are_no_spans_are_refused(row: object):
    with pytest.raises(FormatError):
        read_spans([row])


def test_spans_that_are_no_list_are_refused():
    with pytest.raises(FormatError, match="list"):
        read_spans({"0": []})
