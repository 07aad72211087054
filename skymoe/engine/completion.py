"""What `skymoe.LLM` answers: plain data; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from skymoe.engine.output import Finish, TokenLogprobs, TokenOutput
from skymoe.engine.text import TextDelta


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer to a prompt.

    Attributes:
        text: without the stop string or the token that ended it; "" where the model has no tokenizer.
        token_ids: the tokens drawn; the one that ended the text (Finish.STOP) is among them.
        finish: why it ended.
        logprobs: of each of `token_ids`, where `SamplingParams.logprobs` asks for them.
        stopped_by: the stop string or the token of `stop_token_ids` that ended it.
        error: why there is no (whole) answer, with Finish.ERROR.
    """

    text: str
    token_ids: tuple[int, ...]
    finish: Finish
    logprobs: tuple[TokenLogprobs, ...] | None = None
    stopped_by: str | int | None = None
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """The answers to one prompt.

    Attributes:
        prompt: the text that was given; None for token ids and conversations.
        prompt_ids: the same as tokens.
        outputs: `n` answers.
        prompt_logprobs: of prompt tokens 1, 2, ..., where `SamplingParams.prompt_logprobs` asks for them.
        num_cached_tokens: prompt tokens that were in the cache already, of the first answer.
    """

    prompt: str | None
    prompt_ids: tuple[int, ...]
    outputs: tuple[Answer, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    num_cached_tokens: int = 0

    @property
    def text(self) -> str:
        """Of the first answer."""
        return self.outputs[0].text


@dataclass
class Draft:
    """An answer while it comes."""

    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    num_cached_tokens: int = 0
    last: TextDelta = field(default_factory=TextDelta)

    def push(self, output: TokenOutput, delta: TextDelta) -> None:
        """What a step brought, as the engine says it and as text."""
        self.pieces.append(delta.text)
        self.token_ids += delta.token_ids
        if output.logprobs is not None:
            self.logprobs.append(output.logprobs)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        self.num_cached_tokens += output.num_cached_tokens or 0
        self.last = delta

    def answer(self) -> Answer:
        """When it has come."""
        assert self.last.finish is not None
        return Answer(
            text="".join(self.pieces),
            token_ids=tuple(self.token_ids),
            finish=self.last.finish,
            logprobs=tuple(self.logprobs) or None,
            stopped_by=self.last.stopped_by,
            error=self.last.error,
        )


def completion(prompt: str | None, prompt_ids: tuple[int, ...], drafts: Sequence[Draft]) -> Completion:
    """The answers to one prompt."""
    return Completion(
        prompt=prompt,
        prompt_ids=prompt_ids,
        outputs=tuple(draft.answer() for draft in drafts),
        prompt_logprobs=drafts[0].prompt_logprobs,
        num_cached_tokens=drafts[0].num_cached_tokens,
    )
