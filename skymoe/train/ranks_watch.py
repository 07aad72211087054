"""On log steps of a run on many ranks: where each was in the last step, and who is slower than its neighbours."""

from __future__ import annotations

from collections.abc import Mapping

from skymoe.base.log import logger
from skymoe.parallel.heartbeat import named
from skymoe.parallel.stragglers import stragglers
from skymoe.plan.expected import expected_timeline
from skymoe.train.job import Job
from skymoe.train.lines import timeline_line
from skymoe.train.ranks import micro_batches


def watch_ranks(job: Job) -> None:
    """Record the timeline of the last step, and warn of stragglers. Every rank calls it."""
    if job.mesh is None or job.times is None:
        return
    timeline = job.state.engine.timeline()
    times = job.times.exchange(by_kind(job.heart.busy()))
    if timeline is not None:
        layout = job.mesh.layout
        planned = expected_timeline(timeline, layout, micro_batches(job.config.batch, layout))
        job.record(timeline_line(job, layout, timeline.spans, span_s=timeline.span_s, planned=planned.spans))
    for slow in stragglers(times):
        who = named(slow.rank, slow.coordinate)
        if job.is_chief:
            logger.warning("%s is slow: %.2f x the median of its stage, most of it in %s", who, slow.ratio, slow.phase)
        job.event("straggler", rank=slow.rank, ratio=slow.ratio, phase=slow.phase)


def by_kind(busy: Mapping[str, float]) -> dict[str, float]:
    """Seconds by kind of work: "forward, micro-batch 2, stage 1" is forward."""
    seconds: dict[str, float] = {}
    for phase, spent in busy.items():
        kind = phase.partition(",")[0]
        seconds[kind] = seconds.get(kind, 0.0) + spent
    return seconds
