"""Runs of many ranks that look like real ones: train lines with figures per device, and timelines.

`PYTHONPATH=tests python tests/report/fake_ranks.py DIR` writes some to look at.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from report.fake_runs import write_run
from spec.schedules import one_f_one_b

from skymoe.spec.layout import Coordinate, Layout, ScheduleKind
from skymoe.spec.split import Split
from skymoe.spec.timeline import Span, timeline_record


def write_parallel_run(
    path: Path, layout: Layout, *, num_micros: int = 8, planned: bool = True, steps: int = 20, seed: int = 0
) -> Path:
    """One run directory with a timeline at every fifth step."""
    write_run(path, moe=True, steps=steps, seed=seed)
    lines = []
    for text in (path / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        if line["kind"] == "train":
            speed = line["tokens_per_s"]
            line |= {"world_size": layout.world_size, "tokens_per_s_per_device": speed / layout.world_size}
            line["hfu"] = line["mfu_causal"] * 1.21
        lines.append(line)
        if line["kind"] == "train" and line["step"] % 5 == 0:
            plan = spread(layout, _passes(layout, num_micros, None)) if planned else []
            measured = spread(layout, _passes(layout, num_micros, np.random.default_rng(seed + line["step"])))
            lines.append(timeline_record(layout, measured, step=line["step"], planned=plan))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def spread(layout: Layout, spans: Sequence[Span]) -> list[Span]:
    """The passes of each pipeline rank on all its replicas and tensor-parallel ranks."""
    return [
        span._replace(rank=layout.rank(Coordinate(span.rank, dp, tp)))
        for span in spans
        for dp in range(layout.dp)
        for tp in range(layout.tp)
    ]


def _passes(layout: Layout, num_micros: int, noise: np.random.Generator | None) -> list[Span]:
    def seconds(rank: int, kind: str, micro: int) -> float:
        layers = layout.stages.sizes[rank] / 2 + (0.6 if rank == layout.pp - 1 else 0)
        again = layout.recompute[rank] if kind == "B" else 0
        length = 0.004 * (layers * (1 if kind == "F" else 2) + again)
        return length * (1 if noise is None else 1.03 + 0.05 * abs(noise.standard_normal()))

    spans = one_f_one_b(layout.pp, num_micros, seconds)
    if layout.schedule is not ScheduleKind.ZERO_BUBBLE:
        return spans
    return [part for span in spans for part in _in_two_stages(span, layout.pp)]


def _in_two_stages(span: Span, pp: int) -> list[Span]:
    """A picture of zbv, not the schedule: each pass as two stages, each backward in two."""
    middle = (span.start_s + span.end_s) / 2
    first, second = span._replace(end_s=middle), span._replace(stage=2 * pp - 1 - span.rank, start_s=middle)
    if span.kind == "F":
        return [first, second]
    return [first._replace(kind="I"), second._replace(kind="W")]


if __name__ == "__main__":
    root = Path(sys.argv[1])
    write_parallel_run(root / "planned", Layout(pp=4, stages=Split((6, 6, 5, 3)), recompute=(3, 2, 1, 0)))
    v_shape = Layout(pp=3, dp=2, tp=2, stages=Split.remainder_first(12, 6), schedule=ScheduleKind.ZERO_BUBBLE)
    write_parallel_run(root / "zbv", v_shape, planned=False)
    write_parallel_run(root / "long", Layout(pp=4, tp=2, stages=Split((5, 5, 4, 4))), num_micros=64)
