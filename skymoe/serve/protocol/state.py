"""What operators and the page ask: is it alive, is it ready, what is it doing."""

from __future__ import annotations

from typing import Literal

from skymoe.serve.protocol.common import Answer


class Health(Answer):
    """How the server stands. `loaded` of `total` bytes of weights are read, while `loading`."""

    status: Literal["ok", "loading", "draining", "dead"]
    loaded: int = 0
    total: int = 0


class Version(Answer):
    """Of skymoe."""

    version: str


class Stats(Answer):
    """What the page shows. Counts are since the start; `tokens_per_second` is of the last ten seconds, all requests.

    `expert_tokens` has a row for each of `moe_layers`: the tokens that each expert was given.
    """

    model: str
    version: str
    uptime_seconds: float
    max_model_len: int
    vocab_size: int
    weights: str
    kv_dtype: str
    num_ranks: int
    split: dict[str, list[int]]
    num_running: int
    num_waiting: int
    kv_cache_usage: float
    prompt_tokens: int
    generation_tokens: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    num_preemptions: int
    tokens_per_second: float
    num_layers: int
    num_experts: int
    moe_layers: list[int]
    expert_tokens: list[list[int]]
