"""The ranks of an engine as threads of the test: real gloo between them, no process to start.

with ThreadedRanks(config) as ranks:
    logits = serve(ranks.run, prompts)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from skymoe.engine.config import EngineConfig
from skymoe.engine.division import divide
from skymoe.engine.exchange import Exchange
from skymoe.engine.group import fp8_of
from skymoe.engine.runner import Runner
from skymoe.engine.step import Chunk, StepPlan
from skymoe.spec.hf import spec_from_directory

T = TypeVar("T")


class ThreadedRanks:
    """All ranks of `config`, loaded and connected."""

    def __init__(self, config: EngineConfig) -> None:
        spec = spec_from_directory(config.model)
        self.plan = divide(spec, config, fp8_block=fp8_of(config.model)[1])
        size = self.plan.num_ranks
        self._pool = ThreadPoolExecutor(size)
        store = dist.HashStore()

        def start(rank: int) -> Runner:
            runner = Runner(spec, self.plan, rank, config)
            runner.connect(Exchange(rank, size, store, timeout_s=30))
            return runner

        self.runners = self._all(start)

    def run(self, step: StepPlan) -> Tensor:
        """One step on all ranks."""
        first, *others = self._all(lambda rank: self.runners[rank].run(step))
        assert first is not None and all(other is None for other in others)
        return first

    def _all(self, work: Callable[[int], T]) -> list[T]:
        size = self.plan.num_ranks
        return [future.result(60) for future in [self._pool.submit(work, rank) for rank in range(size)]]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=error[0] is None)


def random_prompts(vocab_size: int, lengths: Sequence[int], *, seed: int = 0) -> list[list[int]]:
    """Prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def serve(
    run: Callable[[StepPlan], Tensor], prompts: Sequence[Sequence[int]], *, page_size: int, num_pages: int,
    seed: int = 0, most: int = 9,
) -> list[Tensor]:  # fmt: skip
    """Logits (T, V) of each prompt, read in random chunks that run together, on pages that lie anywhere."""
    draw = random.Random(seed)
    pages = draw.sample(range(num_pages), num_pages)
    tables = [[pages.pop() for _ in range(-(-len(prompt) // page_size))] for prompt in prompts]
    done, found = [0] * len(prompts), [[] for _ in prompts]
    while any(at < len(prompt) for at, prompt in zip(done, prompts, strict=True)):
        chunks, who = [], []
        for i, prompt in enumerate(prompts):
            size = min(draw.choice((0, 1, 1, most)), len(prompt) - done[i])
            if size:
                end = done[i] + size
                chunks.append(
                    Chunk(tuple(prompt[done[i] : end]), done[i], tuple(tables[i][: -(-end // page_size)]), size)
                )
                who.append(i)
                done[i] = end
        if chunks:
            logits = run(StepPlan(tuple(chunks)))
            for i, part in zip(who, logits.split([len(chunk.tokens) for chunk in chunks]), strict=True):
                found[i].append(part)
    return [torch.cat(parts) for parts in found]


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected number."""
    assert found.shape == expected.shape and bool(found.isfinite().all())
    return float((found - expected).abs().max() / expected.abs().max())
