"""The completions of one HTTP request: into the engine, and out as pieces of text.

`n` completions of a prompt are `n` requests to the engine, with seeds that follow one another; they share the pages of
the prompt. A request that reaches a stop string is ended here, as the engine knows tokens only.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from skymoe.base.errors import ConfigError
from skymoe.engine.output import EngineInfo, Finish, TokenOutput
from skymoe.engine.params import MAX_SEED, SamplingParams
from skymoe.engine.text import TextDelta, TextOutput
from skymoe.serve.client import EngineDied
from skymoe.serve.errors import ApiError, refuse, too_long
from skymoe.serve.metrics import Metrics
from skymoe.serve.protocol.common import Sampling, Usage
from skymoe.serve.service import Service, engine_died


@dataclass
class Choice:
    """One completion under way.

    Attributes:
        index: in the answer.
        prompt: its tokens; `prompt_index` says of which prompt of the request.
        params: how to continue.
        output: tokens to text.
        num_tokens: written so far.
        cached: tokens of the prompt that were in the cache.
        finish: why it ended.
        last: when its last token came.
    """

    index: int
    prompt_index: int
    prompt: tuple[int, ...]
    params: SamplingParams
    output: TextOutput
    num_tokens: int = 0
    cached: int = 0
    finish: Finish | None = None
    last: float = 0.0


def sampling_params(
    request: Sampling, *, max_tokens: int | None, logprobs: int | None = None, prompt_logprobs: int | None = None
) -> SamplingParams:
    """The engine's parameters of a request. With `max_tokens` 0 it writes one token, which the caller drops.

    Raises:
        ApiError: 400.
    """
    given = {
        "min_tokens": request.min_tokens,
        "temperature": request.temperature,
        "top_k": None if request.top_k is None else max(request.top_k, 0),
        "top_p": request.top_p,
        "min_p": request.min_p,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "repetition_penalty": request.repetition_penalty,
        "seed": None if request.seed is None else request.seed & MAX_SEED,
        "logit_bias": {int(token): bias for token, bias in (request.logit_bias or {}).items()},
        "logprobs": logprobs,
        "prompt_logprobs": prompt_logprobs,
        "stop": request.stops,
        "stop_token_ids": tuple(request.stop_token_ids or ()),
        "ignore_eos": request.ignore_eos,
    }
    fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if max_tokens is not None:
        fields["min_tokens"] = min(fields.get("min_tokens", 0), max(max_tokens, 1))
    try:
        return SamplingParams(max_tokens=None if max_tokens is None else max(max_tokens, 1), **fields)
    except ConfigError as error:
        refuse(error, code="invalid_request")


def fit(params: SamplingParams, prompt: Sequence[int], info: EngineInfo) -> SamplingParams:
    """`params` for this prompt: the answer ends with the context. Raises ApiError 400 when the prompt does not fit."""
    room = info.max_model_len - len(prompt)
    if room < 1:
        raise too_long(len(prompt), info.max_model_len)
    check_tokens((*prompt, *params.logit_bias, *params.stop_token_ids), info)
    most = room if params.max_tokens is None else min(params.max_tokens, room)
    return replace(params, max_tokens=most, min_tokens=min(params.min_tokens, most))


def check_tokens(tokens: Sequence[int], info: EngineInfo) -> None:
    """Raises ApiError 400 for a token that is not in the vocabulary."""
    highest = max(tokens, default=0)
    if highest >= info.vocab_size:
        message = f"token {highest} is not in the vocabulary, which has {info.vocab_size} tokens"
        raise ApiError(400, message, code="invalid_token")


def make_choices(
    service: Service,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    n: int,
    info: EngineInfo,
    *,
    offsets: Sequence[int] | None = None,
) -> list[Choice]:
    """`n` completions of each prompt; `offsets`: where the text of each begins in what the client sees."""
    choices = []
    for prompt_index, prompt in enumerate(prompts):
        own = fit(params, prompt, info)
        for i in range(n):
            seeded = own if own.seed is None else replace(own, seed=(own.seed + i) & MAX_SEED)
            ids = tuple(prompt)
            output = service.texts.output(ids, seeded, offset=offsets[prompt_index] if offsets else 0)
            choices.append(Choice(prompt_index * n + i, prompt_index, ids, seeded, output))
    return choices


async def run(
    service: Service, choices: Sequence[Choice], arrival: float
) -> AsyncGenerator[tuple[Choice, TextDelta], None]:
    """Continue all `choices`; pieces as they come. Close it (`aclosing`): what has not ended is aborted.

    Raises:
        ApiError: the engine failed at a request, or has ended.
    """
    name = secrets.token_hex(12)
    by_id = {f"{name}-{choice.index}": choice for choice in choices}
    async with contextlib.aclosing(service.engine.channel()) as channel:
        try:
            for request_id, choice in by_id.items():
                channel.submit(request_id, choice.prompt, choice.params)
            async for news in channel:
                choice = by_id[news.request_id]
                _raise_failure(choice, news, service.metrics)
                delta = choice.output.push(news)
                _count(choice, news, delta, service.metrics, arrival)
                if delta.finish is not None and news.finish is None:  # a stop string
                    channel.forget(news.request_id)
                yield choice, delta
        except EngineDied as error:
            raise engine_died() from error
        finally:
            for choice in choices:
                if choice.finish is None:
                    service.metrics.finished(Finish.ABORT)


def _raise_failure(choice: Choice, news: TokenOutput, metrics: Metrics) -> None:
    if news.finish is Finish.ERROR:
        choice.finish = news.finish
        metrics.finished(news.finish)
        raise ApiError(500, news.error or "the engine could not answer this request", code="engine_error")
    if news.finish is Finish.ABORT:
        raise ApiError(503, "the server is shutting down", code="aborted")


def _count(choice: Choice, news: TokenOutput, delta: TextDelta, metrics: Metrics, arrival: float) -> None:
    now = time.monotonic()
    if news.num_cached_tokens is not None:
        choice.cached = news.num_cached_tokens
    if news.token_id is not None:
        choice.num_tokens += 1
        metrics.wrote(1)
        if choice.num_tokens == 1:
            metrics.first_token.observe(now - arrival)
        else:
            metrics.between_tokens.observe(now - choice.last)
        choice.last = now
    if delta.finish is not None:
        choice.finish = delta.finish
        metrics.finished(delta.finish)
        metrics.end_to_end.observe(now - arrival)
        metrics.prompt_tokens.observe(len(choice.prompt))
        metrics.generation_tokens.observe(choice.num_tokens)


def usage(choices: Sequence[Choice], *, written: bool = True) -> Usage:
    """Tokens of all choices; a prompt counts once, however many continue it."""
    firsts = {choice.prompt_index: choice for choice in reversed(choices)}
    prompt = sum(len(choice.prompt) for choice in firsts.values())
    cached = sum(choice.cached for choice in firsts.values())
    return Usage.of(prompt, sum(choice.num_tokens for choice in choices) if written else 0, cached)
