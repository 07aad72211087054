"""The engine: requests in, tokens out, step by step.

    engine.add("a", prompt_ids, SamplingParams(temperature=0))
    while engine.has_work:
        for output in engine.step():
            ...

One step is: the scheduler decides which tokens run, all ranks run them, the sampler draws from the rows of logits, the
scheduler takes the draws in. Who calls `step` is the caller's business: a loop in a process of its own behind the
server (worker.py), the user's thread (llm.py). Text, templates, stop strings and several answers to one prompt are made
above; here there are token ids only.

Two bulkheads keep the trouble of one request away from the others. What a request asks is checked when it is added; and
where the sampler raises, each row is drawn again alone, and only those fail that fail alone.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from torch import Tensor

from skymoe.base.errors import MachineError, SkymoeError
from skymoe.base.log import logger
from skymoe.engine.admission import check_request
from skymoe.engine.config import EngineConfig
from skymoe.engine.group import ServingGroup, open_group
from skymoe.engine.output import EngineInfo, EngineStats, TokenOutput
from skymoe.engine.params import SamplingParams
from skymoe.engine.request import Request, Sampled, SampleRow
from skymoe.engine.sampling import Sampler
from skymoe.engine.scheduler import Scheduler


class Engine:
    """A model on its ranks, and the requests that it is answering.

    Args:
        config: the model, its division, its limits.
        loaded: is told how many layers rank 0 has read, and how many there are.

    Attributes:
        info: what it is.

    Raises:
        FormatError, ConfigError: the model or the division cannot be used.
        MachineError: a follower did not start, or memory is short.
    """

    def __init__(self, config: EngineConfig, *, loaded: Callable[[int, int], None] | None = None) -> None:
        self._group = open_group(config, loaded=loaded)
        spec = self._group.spec
        self._sampler = Sampler(spec.vocab_size, config.device)
        self._scheduler = Scheduler(
            config, num_pages=self._group.num_pages, max_model_len=self._group.max_model_len,
            eos_ids=self._group.eos_ids, vocab_size=spec.vocab_size,
        )  # fmt: skip
        self.info = _info(config, self._group, self._scheduler.max_model_len)
        self._step_seconds = 0.0
        self._is_cut_off = False  # an error or Ctrl-C came in the middle of a step: ranks may disagree

    def add(self, id: str, prompt: Sequence[int], params: SamplingParams) -> None:
        """Take a request in.

        Raises:
            QueueFullError: too many wait; later there may be room.
            ConfigError: it can never be answered here (too long, unknown tokens), or the id is taken.
        """
        self._scheduler.add(Request(id, tuple(prompt), params, time.monotonic()))

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Raises ConfigError where a request can never be answered here, whatever else is running."""
        request = Request("check", tuple(prompt), params)
        check_request(request, max_model_len=self.info.max_model_len, vocab_size=self.info.vocab_size)

    def abort(self, id: str) -> bool:
        """Forget a request, and free its pages at once; False where it is not (or no longer) here."""
        return self._scheduler.abort(id)

    def step(self) -> list[TokenOutput]:
        """Run one step; news of the requests that took part.

        Raises:
            MachineError: a rank is dead or does not answer; the engine is of no use any more.
        """
        if self._is_cut_off:
            raise MachineError("a step of this engine was cut off", hint="close it and make another")
        scheduled = self._scheduler.plan()
        if scheduled is None:
            return []
        self._is_cut_off, begin = True, time.perf_counter()
        logits_RV = self._group.run(scheduled.step)
        sampled = self._sample(logits_RV, scheduled.rows)
        outputs = self._scheduler.settle(scheduled, sampled)
        self._is_cut_off = False
        self._step_seconds += time.perf_counter() - begin
        return outputs

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self._scheduler.has_work

    def alive(self) -> None:
        """Raises MachineError when a rank has died; to be asked now and then while there is no work."""
        self._group.check()

    def stats(self) -> EngineStats:
        """How things stand."""
        counts = self._scheduler.stats()
        return dataclasses.replace(
            counts,
            step_seconds=self._step_seconds,
            expert_tokens=tuple(tuple(row) for row in self._group.expert_tokens()),
        )

    def close(self) -> None:
        """End the followers and let go of the memory; harmless twice."""
        self._group.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _sample(self, logits_RV: Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
        """An answer to each row, also where the sampler has a defect that one of them meets."""
        try:
            return self._sampler.sample(logits_RV, rows)
        except Exception:
            logger.exception("sampling failed; each row is drawn alone")
            return [self._sample_one(logits_RV[place : place + 1], row) for place, row in enumerate(rows)]

    def _sample_one(self, logits_1V: Tensor, row: SampleRow) -> Sampled:
        try:
            return self._sampler.sample(logits_1V, [row])[0]
        except SkymoeError as error:
            return Sampled(error=error.what)
        except Exception as error:
            return Sampled(error=f"no token could be drawn: {type(error).__name__}")


def _info(config: EngineConfig, group: ServingGroup, max_model_len: int) -> EngineInfo:
    spec = group.spec
    return EngineInfo(
        name=config.model.resolve().name,
        vocab_size=spec.vocab_size,
        max_model_len=max_model_len,
        eos_ids=group.eos_ids,
        bos_id=spec.bos_id,
        num_ranks=group.plan.num_ranks,
        num_pages=group.num_pages,
        page_size=config.page_size,
        num_layers=spec.num_layers,
        num_experts=spec.moe.num_experts if spec.moe is not None and spec.moe_layer_ids else 0,
        moe_layers=tuple(spec.moe_layer_ids),
        weights=group.weights,
        kv_dtype=group.kv_dtype,
        split={name: tuple(sizes) for name, sizes in group.plan.split.model_dump().items()},
    )
