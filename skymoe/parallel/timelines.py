"""What each rank's clock says, put together on rank 0."""

from __future__ import annotations

import json

from skymoe.parallel.clock import Clock
from skymoe.parallel.mesh import Mesh
from skymoe.parallel.texts import gather_bytes
from skymoe.plan.timeline import Timeline
from skymoe.spec.timeline import Span


def whole_timeline(clock: Clock, mesh: Mesh) -> Timeline | None:
    """The step on all ranks, on rank 0; None on the others. Every rank calls it.

    Each clock starts when its rank does, and the first stage starts before the last: it is through with the statistics
    pass earlier. What they have in common is the sum over the world after the step, which all leave together
    (`Clock.meet`); so the times are those since the first rank's start, as exact as that sum is short.
    """
    own = clock.timeline()
    told = json.dumps([clock.until_meeting_s, own.span_s, [list(span) for span in own.spans]])
    texts = gather_bytes(told.encode(), mesh.world, mesh.device)
    if not texts:
        return None
    rows = [json.loads(text) for text in texts]
    first = max(until_meeting_s for until_meeting_s, _, _ in rows)
    spans = [_later(Span(*span), first - own_s) for own_s, _, spans in rows for span in spans]
    return Timeline.of(spans, max(span_s + first - own_s for own_s, span_s, _ in rows))


def _later(span: Span, by_s: float) -> Span:
    return span._replace(start_s=span.start_s + by_s, end_s=span.end_s + by_s)
