"""`/v1/chat/completions`: answer in a conversation, by the template of the model."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Sequence
from typing import Any

from starlette.types import Send

from skymoe.engine.text import TextDelta
from skymoe.engine.token_text import LogprobText, chat_logprobs
from skymoe.serve.generation import Choice, make_choices, run, sampling_params, usage
from skymoe.serve.protocol.chat import (
    AnswerMessage,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatLogprobs,
    ChatRequest,
)
from skymoe.serve.protocol.common import Usage
from skymoe.serve.service import Service
from skymoe.serve.sse import Events, send_events, send_json


class Chat:
    """One request, from its body to its answer.

    Args:
        service: the server's.
        request: what is asked.
    """

    def __init__(self, service: Service, request: ChatRequest) -> None:
        self._service = service
        self._request = request
        self._arrival = time.monotonic()
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._with_tokens = bool(request.return_token_ids)
        self._info = service.info()
        service.check_model(request.model)
        self._num_choices = service.check_choices(1, request)

    async def answer(self, send: Send) -> None:
        """Do it. Raises ApiError while nothing has been sent."""
        request = self._request
        size = sum(len(message.text.encode()) for message in request.messages)
        n = request.n or 1
        with self._service.admission.reserve(self._num_choices, n * min(size, self._info.max_model_len)) as place:
            open_answer = request.add_generation_prompt is not False
            prompt = await self._service.texts.chat(request.messages, open_answer=open_answer)
            self._service.admission.settle(place, n * len(prompt))
            most = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
            logprobs = (request.top_logprobs or 0) if request.logprobs else None
            params = sampling_params(request, max_tokens=most, logprobs=logprobs)
            choices = make_choices(self._service, [prompt], params, n, self._info)
            if request.stream:
                await send_events(send, self._events(choices))
            else:
                await send_json(send, await self._whole(choices))

    async def _whole(self, choices: Sequence[Choice]) -> bytes:
        """The answer in one piece."""
        texts = ["" for _ in choices]
        logprobs: list[list[LogprobText]] = [[] for _ in choices]
        token_ids: list[list[int]] = [[] for _ in choices]
        async with contextlib.aclosing(run(self._service, choices, self._arrival)) as deltas:
            async for choice, delta in deltas:
                texts[choice.index] += delta.text
                logprobs[choice.index] += delta.logprobs
                token_ids[choice.index] += delta.token_ids
        answers = [
            ChatChoice(
                index=choice.index,
                message=AnswerMessage(content=texts[choice.index]),
                logprobs=self._logprobs(logprobs[choice.index]),
                finish_reason=choice.finish,
                token_ids=token_ids[choice.index],
            )
            for choice in choices
        ]
        answer = ChatAnswer(
            id=self._id, created=self._created, model=self._service.name, choices=answers, usage=usage(choices),
            prompt_token_ids=list(choices[0].prompt),
        )  # fmt: skip
        return answer.model_dump_json(exclude=self._hidden(usage=True, prompt=True)).encode()

    async def _events(self, choices: Sequence[Choice]) -> Events:
        """The answer in pieces: who speaks, what, why it ended, and what it took."""
        prompt = list(choices[0].prompt) if self._with_tokens else None
        for choice in choices:
            opening = ChatChunkChoice(index=choice.index, delta={"role": "assistant", "content": ""})
            yield self._json([opening], None, prompt=prompt if choice is choices[0] else None)
        async with contextlib.aclosing(run(self._service, choices, self._arrival)) as deltas:
            async for choice, delta in deltas:
                if delta.text or delta.logprobs or delta.finish or (delta.token_ids and self._with_tokens):
                    yield self._json([self._piece(choice, delta)], self._usage_so_far(choices))
        if self._request.wants_usage:
            yield self._json([], usage(choices))

    def _piece(self, choice: Choice, delta: TextDelta) -> ChatChunkChoice:
        return ChatChunkChoice(
            index=choice.index,
            delta={"content": delta.text} if delta.text or not delta.finish else {},
            logprobs=self._logprobs(delta.logprobs),
            finish_reason=delta.finish,
            token_ids=list(delta.token_ids),
        )

    def _usage_so_far(self, choices: Sequence[Choice]) -> Usage | None:
        options = self._request.stream_options
        return usage(choices) if options is not None and options.continuous_usage_stats else None

    def _logprobs(self, tokens: Sequence[LogprobText]) -> ChatLogprobs | None:
        if not self._request.logprobs:
            return None
        return ChatLogprobs(**chat_logprobs(tokens))

    def _json(self, choices: list[ChatChunkChoice], used: Usage | None, *, prompt: list[int] | None = None) -> bytes:
        chunk = ChatChunk(
            id=self._id, created=self._created, model=self._service.name, choices=choices, usage=used,
            prompt_token_ids=prompt,
        )  # fmt: skip
        return chunk.model_dump_json(exclude=self._hidden(usage=used is not None, prompt=prompt is not None)).encode()

    def _hidden(self, *, usage: bool, prompt: bool) -> dict[str, Any]:
        """What an answer does not carry: OpenAI's have no tokens."""
        hidden: dict[str, Any] = {} if self._with_tokens else {"choices": {"__all__": {"token_ids"}}}
        if not usage:
            hidden["usage"] = True
        if not (prompt and self._with_tokens):
            hidden["prompt_token_ids"] = True
        return hidden
