"""Tokens per second by batch: the sweep, the best batch, and what bounds it."""

from __future__ import annotations

from collections.abc import Sequence

from skymoe.plan.serve.frontier import Fitted
from skymoe.plan.serve.report import BatchPoint
from skymoe.plan.serve.step import Load, Setting, step_s, total_s
from skymoe.plan.serve.workload import Workload, first_token_s, period_s

_CAUSES = {
    "weights": "reading and multiplying weights",
    "attention": "reading keys and values",
    "reduce": "all-reduces over the link",
    "head": "the head and its logits",
    "engine": "the engine's own overhead",
}


def sweep(setting: Setting, workload: Workload, kv_tokens: int, batches: Sequence[int]) -> tuple[BatchPoint, ...]:
    """One point per batch, ascending."""
    return tuple(_point(setting, workload, kv_tokens, batch) for batch in sorted(set(batches)))


def _point(setting: Setting, workload: Workload, kv_tokens: int, batch: int) -> BatchPoint:
    fits = batch * workload.length <= kv_tokens
    length = workload.prompt + workload.output / 2
    parts = step_s(setting, Load(decode=batch, context=length))
    step = sum(parts.values())
    period = period_s((setting,), workload, batch)
    first = first_token_s((setting,), workload.prompt, setting.engine.chunk)
    return BatchPoint(
        batch=batch, fits=fits, sequence_tokens=length, step_s=step, tokens_per_s=batch / step,
        mixed_tokens_per_s=batch / period, inter_token_s=period, ttft_s=first + (period / 2 if batch > 1 else 0.0),
        parts={name: value / step for name, value in parts.items()},
    )  # fmt: skip


def best(points: Sequence[BatchPoint]) -> BatchPoint | None:
    """The fitting batch with most tokens per second."""
    return max((p for p in points if p.fits), key=lambda p: p.mixed_tokens_per_s, default=None)


def limits(points: Sequence[BatchPoint], fitted: Fitted, workload: Workload) -> tuple[str, ...]:
    """What bounds the best batch."""
    point = best(points)
    if point is None:
        return (f"memory: {fitted.kv_tokens} tokens have room, less than one request of {workload.length}",)
    largest = sorted(point.parts.items(), key=lambda item: -item[1])[:2]
    words = [f"a step at batch {point.batch}: {share:.0%} {_CAUSES[name]}" for name, share in largest]
    refused = [p.batch for p in points if not p.fits]
    if refused:
        most = fitted.kv_tokens // workload.length
        words.append(f"memory: at most {most} requests of {workload.length} tokens have room at a time")
    return tuple(words)


def saturation(setting: Setting, workload: Workload, kv_tokens: int, max_batch: int) -> float:
    """Output tokens per second at the largest batch that has room; 0 without one."""
    batch = min(max_batch, kv_tokens // workload.length)
    return batch / total_s(setting, workload.load(batch)) if batch else 0.0
