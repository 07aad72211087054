"""Tokens per second of a workload: continuous batching, as many sequences at a time as keys and values have room for.

A sequence of I prompt and O output tokens is admitted when its I + O tokens have room. With B sequences in the batch, a
step decodes B tokens and, since B / O sequences end in it, takes in I B / O prompt tokens of those that follow: both
share the step's time. N requests that arrive at once run in floor(N / B) full batches and a smaller last one, which is
why a published "throughput" depends on its number of requests. In a pipeline the batch is in as many parts as stages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from skymoe.plan.serve.step import Load, Setting, total_s


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests that are alike.

    Attributes:
        prompt, output: tokens.
        requests: that arrive at once; None for an endless stream.
    """

    prompt: int
    output: int
    requests: int | None = None

    @property
    def length(self) -> int:
        """Tokens of a finished sequence."""
        return self.prompt + self.output

    def load(self, batch: float) -> Load:
        """An average step with `batch` sequences."""
        ended = batch / self.output
        return Load(
            decode=batch, context=self.prompt + self.output / 2, prefill=ended * self.prompt,
            prefill_context=self.prompt / 2, done=ended,
        )  # fmt: skip


def most_sequences(workload: Workload, kv_tokens: float, max_batch: int) -> int:
    """Sequences at a time; 0 when not even one has room."""
    most = min(int(kv_tokens // workload.length), max_batch)
    return most if workload.requests is None else min(most, workload.requests)


def period_s(stages: Sequence[Setting], workload: Workload, batch: float) -> float:
    """Seconds in which each of `batch` sequences gets one token."""
    load = workload.load(batch / len(stages))
    return len(stages) * max(total_s(stage, load) for stage in stages)


def tokens_per_s(stages: Sequence[Setting], workload: Workload, batch: int) -> float:
    """Output tokens per second with at most `batch` sequences at a time."""
    if workload.requests is None:
        return batch / period_s(stages, workload, batch)
    rounds, rest = divmod(workload.requests, batch)
    seconds = rounds * workload.output * period_s(stages, workload, batch)
    seconds += workload.output * period_s(stages, workload, rest) if rest else 0.0
    return workload.requests * workload.output / seconds


def first_token_s(stages: Sequence[Setting], prompt: int, chunk: int) -> float:
    """Seconds from a prompt to its first token with nothing else to do."""
    seconds, done = 0.0, 0
    for _ in range(math.ceil(prompt / chunk)):
        now = min(chunk, prompt - done)
        last = done + now == prompt
        load = Load(prefill=now, prefill_context=done + now / 2, done=1.0 if last else 0.0)
        seconds += sum(total_s(stage, load) for stage in stages)
        done += now
    return seconds
