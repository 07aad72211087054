"""What the routes share while a server runs, and the questions that come before every request."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from skymoe import __version__
from skymoe.engine.output import EngineInfo, EngineStats
from skymoe.serve.admission import Admission
from skymoe.serve.client import EngineClient, EngineDied
from skymoe.serve.config import ServeConfig
from skymoe.serve.errors import ApiError
from skymoe.serve.metrics import Metrics
from skymoe.serve.protocol.common import Sampling
from skymoe.serve.protocol.state import Health, Stats
from skymoe.serve.texts import Texts

_STATS_S = 10.0


@dataclass(frozen=True)
class Service:
    """One model, served.

    Attributes:
        config: what the user asked for.
        name: of the model, in requests and answers.
        engine: the process that computes.
        texts: tokenizer and template.
        admission: how much may be under way.
        metrics: what happened.
        created: when the server started, in seconds since 1970.
    """

    config: ServeConfig
    name: str
    engine: EngineClient
    texts: Texts
    admission: Admission
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))

    def info(self) -> EngineInfo:
        """What the engine is; raises ApiError 503 while the server does not answer requests."""
        self.admission.check_open(loading=self.engine.info is None)
        if self.engine.died.done() or self.engine.info is None:
            raise engine_died()
        return self.engine.info

    def health(self) -> Health:
        """How the server stands."""
        loaded, total = self.engine.loaded
        if self.engine.died.done():
            return Health(status="dead")
        if self.admission.draining:
            return Health(status="draining")
        if self.engine.info is None:
            return Health(status="loading", loaded=loaded, total=total)
        return Health(status="ok")

    async def engine_stats(self) -> EngineStats | None:
        """What the engine counts; None while it loads, or when it is gone or too busy to say."""
        if self.engine.info is None:
            return None
        try:
            return await asyncio.wait_for(self.engine.stats(), _STATS_S)
        except (EngineDied, TimeoutError):
            return None

    async def stats(self) -> Stats:
        """What the page shows. Raises ApiError 503 when the engine does not say."""
        info, found = self.info(), await self.engine_stats()
        if found is None:
            raise ApiError(503, "the engine is too busy to say", code="no_stats")
        return Stats(
            model=self.name,
            version=__version__,
            uptime_seconds=time.time() - self.created,
            max_model_len=info.max_model_len,
            vocab_size=info.vocab_size,
            weights=info.weights,
            kv_dtype=info.kv_dtype,
            num_ranks=info.num_ranks,
            split={unit: list(counts) for unit, counts in info.split.items()},
            num_running=found.num_running,
            num_waiting=found.num_waiting,
            kv_cache_usage=1 - found.free_pages / found.num_pages if found.num_pages else 0.0,
            prompt_tokens=found.prompt_tokens,
            generation_tokens=found.generation_tokens,
            prefix_cache_queries=found.prefix_queries,
            prefix_cache_hits=found.prefix_hits,
            num_preemptions=found.num_preemptions,
            tokens_per_second=self.metrics.tokens_per_second(),
            num_layers=info.num_layers,
            num_experts=info.num_experts,
            moe_layers=list(info.moe_layers),
            expert_tokens=[list(counts) for counts in found.expert_tokens],
        )

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 for any model but ours; none is ours."""
        if name is not None and name != self.name:
            raise ApiError(404, f"there is no model {name!r} here", param="model", code="model_not_found")

    def check_choices(self, prompts: int, request: Sampling) -> int:
        """Completions that `request` asks for; raises ApiError 400 when they are too many."""
        choices = prompts * (request.n or 1)
        if choices > self.config.limits.choices:
            message = f"prompts times n is {choices}; at most {self.config.limits.choices} completions per request"
            raise ApiError(400, message, param="n", code="too_many_choices")
        return choices


def engine_died() -> ApiError:
    """The engine has ended; the server is about to."""
    return ApiError(503, "the engine has ended; the server is shutting down", code="engine_died")
