"""`/v1/completions`: continue text or tokens; score a prompt with `echo` and `logprobs` as evaluation harnesses do."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Send

from skymoe.engine.text import TextDelta
from skymoe.engine.token_text import LogprobText, completion_logprobs
from skymoe.serve.generation import Choice, check_tokens, make_choices, run, sampling_params, usage
from skymoe.serve.protocol.common import Usage
from skymoe.serve.protocol.completions import (
    CompletionAnswer,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from skymoe.serve.service import Service
from skymoe.serve.sse import Events, send_events, send_json

_DEFAULT_MAX_TOKENS = 16
_TOKENS = {"token_ids", "prompt_token_ids"}  # of a choice; OpenAI's answers have none


@dataclass
class Written:
    """One completion so far."""

    text: str = ""
    logprobs: list[LogprobText] = field(default_factory=list)
    finish: str | None = None
    token_ids: list[int] = field(default_factory=list)


class Completion:
    """One request, from its body to its answer.

    Args:
        service: the server's.
        request: what is asked.
    """

    def __init__(self, service: Service, request: CompletionRequest) -> None:
        self._service = service
        self._request = request
        self._arrival = time.monotonic()
        self._id = f"cmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._max_tokens = _DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
        self._with_tokens = bool(request.return_token_ids)
        self._info = service.info()
        service.check_model(request.model)
        self._num_choices = service.check_choices(len(request.prompts), request)

    async def answer(self, send: Send) -> None:
        """Do it. Raises ApiError while nothing has been sent."""
        with self._service.admission.reserve(self._num_choices, self._estimate()) as place:
            texts, prompts = await self._read_prompts()
            n = self._request.n or 1
            self._service.admission.settle(place, n * sum(len(prompt) for prompt in prompts))
            prompt_logprobs = self._request.logprobs if self._request.echo else None
            params = sampling_params(
                self._request, max_tokens=self._max_tokens, logprobs=self._request.logprobs,
                prompt_logprobs=prompt_logprobs,
            )  # fmt: skip
            offsets = [len(text) for text in texts]
            choices = make_choices(self._service, prompts, params, n, self._info, offsets=offsets)
            if self._request.stream:
                await send_events(send, self._events(choices, texts))
            else:
                await send_json(send, await self._whole(choices, texts))

    def _estimate(self) -> int:
        """The most tokens that the prompts can be, in all choices."""
        most = self._info.max_model_len
        sizes = (len(p.encode()) if isinstance(p, str) else len(p) for p in self._request.prompts)
        return sum(min(size, most) for size in sizes) * (self._request.n or 1)

    async def _read_prompts(self) -> tuple[list[str], list[list[int]]]:
        """What is echoed of each prompt, and its tokens."""
        special = self._request.add_special_tokens is not False
        texts, prompts = [], []
        for prompt in self._request.prompts:
            if isinstance(prompt, str):
                texts.append(prompt if self._request.echo else "")
                prompts.append(await self._service.texts.encode(prompt, special=special, info=self._info))
            else:
                check_tokens(prompt, self._info)
                texts.append(await self._service.texts.decode(prompt) if self._request.echo else "")
                prompts.append(prompt)
        return texts, prompts

    async def _whole(self, choices: Sequence[Choice], texts: Sequence[str]) -> bytes:
        """The answer in one piece."""
        written = [Written(texts[choice.prompt_index]) for choice in choices]
        async with contextlib.aclosing(run(self._service, choices, self._arrival)) as deltas:
            async for choice, delta in deltas:
                piece = self._piece(delta)
                written[choice.index].text += piece.text
                written[choice.index].logprobs += piece.logprobs
                written[choice.index].finish = piece.finish
                written[choice.index].token_ids += piece.token_ids
        answers = [self._choice(choice, written[choice.index], opens=True) for choice in choices]
        return self._json(answers, usage(choices, written=self._max_tokens > 0))

    async def _events(self, choices: Sequence[Choice], texts: Sequence[str]) -> Events:
        """The answer in pieces: an echoed prompt comes with the first."""
        fresh = {choice.index for choice in choices}
        async with contextlib.aclosing(run(self._service, choices, self._arrival)) as deltas:
            async for choice, delta in deltas:
                piece = self._piece(delta)
                opens = choice.index in fresh
                if opens:
                    piece.text = texts[choice.prompt_index] + piece.text
                if piece.text or piece.logprobs or piece.finish or piece.token_ids:
                    fresh.discard(choice.index)
                    yield self._json([self._choice(choice, piece, opens=opens)], self._usage_so_far(choices))
        if self._request.wants_usage:
            yield self._json([], usage(choices, written=self._max_tokens > 0))

    def _usage_so_far(self, choices: Sequence[Choice]) -> Usage | None:
        options = self._request.stream_options
        return usage(choices) if options is not None and options.continuous_usage_stats else None

    def _piece(self, delta: TextDelta) -> Written:
        """What a client sees of `delta`; with `max_tokens` 0, nothing of the token that the engine had to write."""
        logprobs = list(delta.prompt_logprobs or ())
        if self._max_tokens == 0:
            return Written("", logprobs, None if delta.finish is None else "length")
        token_ids = list(delta.token_ids) if self._with_tokens else []
        return Written(delta.text, logprobs + list(delta.logprobs), delta.finish, token_ids)

    def _choice(self, choice: Choice, written: Written, *, opens: bool) -> CompletionChoice:
        """`written` of a choice; `opens`: there was nothing of it before."""
        logprobs = (
            None if self._request.logprobs is None else CompletionLogprobs(**completion_logprobs(written.logprobs))
        )
        return CompletionChoice(
            index=choice.index,
            text=written.text,
            logprobs=logprobs,
            finish_reason=written.finish,
            token_ids=written.token_ids,
            prompt_token_ids=list(choice.prompt) if opens and self._with_tokens else None,
        )

    def _json(self, choices: list[CompletionChoice], used: Usage | None) -> bytes:
        answer = CompletionAnswer(
            id=self._id, created=self._created, model=self._service.name, choices=choices, usage=used
        )
        hidden: dict[str, Any] = {} if self._with_tokens else {"choices": {"__all__": _TOKENS}}
        return answer.model_dump_json(exclude=hidden if used is not None else {**hidden, "usage": True}).encode()
