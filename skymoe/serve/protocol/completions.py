"""`/v1/completions`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import Field, WithJsonSchema

from skymoe.serve.protocol.common import (
    TOKENS,
    Answer,
    Count,
    ResponseFormat,
    Sampling,
    Text,
    TokenList,
    TopLogprobs,
    Usage,
)
from skymoe.serve.protocol.told import Refused, Told

MAX_PROMPTS = 128

_Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
_Some = Field(min_length=1)
_SomeTokens = {**TOKENS, "minItems": 1}
_Many = {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS}

# Tokens first, as there may be a million of them: the first reading that holds is taken.
if TYPE_CHECKING:
    Prompt: TypeAlias = str | list[int] | list[str] | list[list[int]]
else:
    Prompt = Annotated[
        Annotated[TokenList, _Some]
        | Text
        | _Texts
        | Annotated[list[Annotated[TokenList, _Some]], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)],
        Field(union_mode="left_to_right"),
        Told(
            f"must be a text, a list of tokens (whole numbers from 0), or a list of up to {MAX_PROMPTS} texts or of"
            f" up to {MAX_PROMPTS} lists of tokens; none of them empty"
        ),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "string", "minLength": 1},
                    _SomeTokens,
                    {
                        "type": "array",
                        "items": {"type": "string", "minLength": 1},
                        "minItems": 1,
                        "maxItems": MAX_PROMPTS,
                    },
                    {**_Many, "items": _SomeTokens},
                ]
            }
        ),
    ]


class CompletionRequest(Sampling):
    """A prompt, or several, to continue."""

    prompt: Prompt
    max_tokens: Count | None = None
    """default: 16; the context ends it too; 0 scores the prompt, with `echo`"""
    echo: bool | None = None
    logprobs: TopLogprobs | None = None
    suffix: Literal[""] | None = None
    response_format: ResponseFormat | None = None
    prompt_embeds: Refused = None
    add_special_tokens: bool | None = None
    """whether the tokenizer puts its begin token before text; default: true"""

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, as a list in every case."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


class CompletionLogprobs(Answer):
    """Log-probabilities, token by token; None for the first token of an echoed prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answer):
    """One continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None
    token_ids: list[int] | None = None
    """the tokens written, with the one that ended the text; with `return_token_ids`"""
    prompt_token_ids: list[int] | None = None
    """in a stream, in the first event of the choice"""


class CompletionAnswer(Answer):
    """What was written; with `stream`, a piece of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
