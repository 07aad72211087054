"""CPU time of planning and settling a step, without any model.

    python benchmarks/scheduler.py

So many requests decode, each at about so many tokens; medians of 300 steps in which all of them decode and nothing is
read, with `max_step_tokens` 512 (twice the requests, if that is more) and pages of 16. `encode` is the row of integers
that the other ranks get. At the end, what a long prompt costs once: the keys of its pages.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median

from skymoe.engine.config import EngineConfig
from skymoe.engine.pages import page_keys
from skymoe.engine.params import SamplingParams
from skymoe.engine.request import Request, Sampled
from skymoe.engine.scheduler import Scheduler

NUM_STEPS = 300


def measure(num_requests: int, num_tokens: int) -> tuple[float, float, float]:
    """Median microseconds of plan, settle and encode."""
    config = EngineConfig(model=Path("-"), max_batch=num_requests, max_step_tokens=max(512, 2 * num_requests))
    scheduler = Scheduler(config, num_pages=num_requests * 400, max_model_len=8192, eos_ids=(2,))
    for number in range(num_requests):
        prompt = tuple((number * 7919 + at) % 1000 + 5 for at in range(num_tokens))
        scheduler.add(Request(f"request {number}", prompt, SamplingParams(max_tokens=2000, seed=number)))
    times: list[tuple[float, float, float]] = []
    while len(times) < NUM_STEPS:
        begin = time.perf_counter()
        scheduled = scheduler.plan()
        planned = time.perf_counter()
        assert scheduled is not None, "too few steps in which all decode"
        scheduled.step.encode()
        encoded = time.perf_counter()
        sampled = [Sampled(7)] * len(scheduled.rows)
        drawn = time.perf_counter()
        scheduler.settle(scheduled, sampled)
        settled = time.perf_counter()
        if scheduled.step.num_tokens == len(scheduled.rows) == num_requests:
            times.append((planned - begin, settled - drawn, encoded - planned))
    plan, settle, encode = (1e6 * median(column) for column in zip(*times, strict=True))
    return plan, settle, encode


def main() -> None:
    """Prints a table."""
    print("| requests | tokens each | plan, us | settle, us | encode, us |")
    print("|---|---|---|---|---|")
    for num_requests, num_tokens in ((1, 512), (64, 512), (64, 4000), (256, 1000)):
        plan, settle, encode = measure(num_requests, num_tokens)
        print(f"| {num_requests} | {num_tokens} | {plan:.0f} | {settle:.0f} | {encode:.0f} |")
    prompt = tuple(at % 1000 for at in range(32768))
    begin = time.perf_counter()
    num_keys = len(page_keys(prompt, 16))
    milliseconds = 1e3 * (time.perf_counter() - begin)
    print(f"\nkeys of {num_keys} pages of a prompt of {len(prompt)} tokens: {milliseconds:.1f} ms")


if __name__ == "__main__":
    main()
