"""What the engine says: tokens as they are drawn, facts about itself, and counts. Plain data; no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Finish(StrEnum):
    """Why a request ended."""

    STOP = "stop"  # an end-of-text token, a token of stop_token_ids; in the layer above also a stop string
    LENGTH = "length"  # max_tokens, or the context is full
    ABORT = "abort"  # the client went away, or asked to
    ERROR = "error"  # this request cannot be answered; `TokenOutput.error` says why


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities (natural logarithm, of the model's own distribution before any change) at one position.

    Attributes:
        logprob: of the token that stands there.
        rank: how many tokens are at least as likely, itself included: 1 for the most likely.
        top: the most likely tokens, best first: (token id, log-probability).
    """

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class TokenOutput:
    """News of one request after a step.

    Attributes:
        request_id: whose.
        token_id: the token that was drawn; None where there is none (the prompt's log-probabilities come alone, the
            request was aborted or failed).
        logprobs: of that token, where asked for.
        prompt_logprobs: of prompt tokens 1, 2, ...; once, before or with the first token, where asked for.
        num_cached_tokens: prompt tokens that were in the cache already; with the first token.
        finish: set when this is the last news of the request. The token that ended it (STOP) is part of the output.
        error: what to tell the user, with Finish.ERROR.
    """

    request_id: str
    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    num_cached_tokens: int | None = None
    finish: Finish | None = None
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What a running engine is.

    Attributes:
        name: of the model directory.
        vocab_size, max_model_len: bounds of a request: token ids and prompt + answer in tokens.
        eos_ids, bos_id: special tokens of the model.
        num_ranks: tensor-parallel ranks.
        num_pages, page_size: of the key/value cache.
        num_layers, num_experts, moe_layers: for the expert-load map; 0 experts and no layers when the model is dense.
        weights, kv_dtype: number formats, such as "fp8" and "bf16".
        split: units per rank in layer 0: heads, kv_heads, columns, experts, vocabulary.
    """

    name: str
    vocab_size: int
    max_model_len: int
    eos_ids: tuple[int, ...]
    bos_id: int | None
    num_ranks: int
    num_pages: int
    page_size: int
    num_layers: int
    num_experts: int
    moe_layers: tuple[int, ...]
    weights: str
    kv_dtype: str
    split: dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Counts since the start, and how things stand. The meanings are vLLM's.

    Attributes:
        num_running, num_waiting: requests in the batch; in the queue.
        num_pages, free_pages, cached_pages: of the cache; free for the taking, cached ones included; free ones whose
            content can still be shared.
        prompt_tokens, generation_tokens: tokens read (those found in the cache included), tokens drawn.
        prefix_queries, prefix_hits: prompt tokens looked up in the cache, and found.
        num_preemptions: how often a request gave its pages back to be computed again.
        num_steps, step_seconds: model steps run, and their time in all.
        expert_tokens: tokens per expert, one row per layer of `EngineInfo.moe_layers`.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_pages: int = 0
    free_pages: int = 0
    cached_pages: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    num_preemptions: int = 0
    num_steps: int = 0
    step_seconds: float = 0.0
    expert_tokens: tuple[tuple[int, ...], ...] = field(default=())
