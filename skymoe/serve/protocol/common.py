"""What the requests share: bounds, sampling fields, usage, errors.

Every number has bounds and nothing is converted: `"5"` is no number. Fields that no reader here knows are ignored, as
OpenAI's clients send such (`user`, `store`, `metadata`) and vLLM ignores them too. Fields that would change the answer
and that this server cannot honour are known, and take only the value that asks for nothing (`tools: []`); so a client
is told instead of served something else. Where fields contradict each other the milder reading holds, so that what the
OpenAPI document allows is accepted: `min_tokens` ends at `max_tokens`, `stream_options` without `stream` has no effect.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, WithJsonSchema

from skymoe.engine.params import MAX_BIASES, MAX_LOGPROBS, MAX_SEED, MAX_STOP_BYTES, MAX_STOPS, MIN_REPETITION
from skymoe.serve.protocol.told import Empty, OnlyFalse, OnlyOne, OnlyTrue, Refused, Told

MAX_N = 8
MAX_TOKENS = 2**31 - 1
TOKEN_ID = "token-id"  # marks schemas that get the vocabulary of the model that is served as their bound
TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0, "format": TOKEN_ID}}
_TOKEN_KEY = re.compile(r"0|[1-9][0-9]{0,9}")


class Message(BaseModel):
    """Base of all requests and their parts."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Answer(BaseModel):
    """Base of all answers."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def _short_stop(text: str) -> str:
    if len(text.encode()) > MAX_STOP_BYTES:
        raise ValueError(f"a stop string has at most {MAX_STOP_BYTES} bytes of UTF-8")
    return text


def _token_keys(biases: dict[str, float]) -> dict[str, float]:
    for key in biases:
        if not _TOKEN_KEY.fullmatch(key):
            raise ValueError('the keys of logit_bias are token ids, such as "42"')
    return biases


def _whole(number: float) -> int:
    if not number.is_integer():
        raise ValueError("Input should be a whole number")
    return int(number)


def whole(least: int, most: int, **schema: object) -> Any:
    """A whole number within bounds. `5.0` is one: JSON Schema says so, and some languages have no other numbers."""
    exact = Field(ge=max(least, -(2**53)), le=min(most, 2**53))  # beyond, a float may stand for its neighbour
    return Annotated[
        Annotated[int, Field(ge=least, le=most)] | Annotated[float, exact, AfterValidator(_whole)],
        WithJsonSchema({"type": "integer", "minimum": least, "maximum": most, **schema}),
    ]


# What mypy reads is the left side: these are whole numbers.
if TYPE_CHECKING:
    TokenList: TypeAlias = list[int]
    StopTokens: TypeAlias = list[int]
    Seed: TypeAlias = int
    Count: TypeAlias = int
    Positive: TypeAlias = int
    TopLogprobs: TypeAlias = int
    TopK: TypeAlias = int
    NumChoices: TypeAlias = int
    One: TypeAlias = int
else:
    _Plain = Annotated[int, Field(ge=0, le=2**31 - 1)]
    _Id = whole(0, 2**31 - 1, format=TOKEN_ID)
    # The plain reading first: it takes a million tokens ten times as fast. The first wrong token ends a reading: a
    # complaint for each of a million took 19 s and 2 GB, and nobody else was answered meanwhile.
    TokenList = Annotated[
        Annotated[list[_Plain], Field(fail_fast=True)] | Annotated[list[_Id], Field(fail_fast=True)],
        Field(union_mode="left_to_right"),
        WithJsonSchema(TOKENS),
    ]
    StopTokens = Annotated[list[_Id], Field(max_length=MAX_BIASES)]
    Seed = whole(-MAX_SEED - 1, MAX_SEED)
    Count = whole(0, MAX_TOKENS)
    Positive = whole(1, MAX_TOKENS)
    TopLogprobs = whole(0, MAX_LOGPROBS)
    TopK = whole(-1, MAX_TOKENS)
    NumChoices = whole(1, MAX_N)
    One = whole(1, 1)
# 64 characters are at most 256 bytes: what the document allows is accepted
StopString = Annotated[
    str, StringConstraints(min_length=1, max_length=MAX_STOP_BYTES // 4), AfterValidator(_short_stop)
]
Stop = Annotated[
    StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)],
    Told(f"must be a text of 1 to {MAX_STOP_BYTES // 4} characters, or a list of up to {MAX_STOPS} such texts"),
]
Text = Annotated[str, StringConstraints(min_length=1)]
LogitBias = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_BIASES),
    AfterValidator(_token_keys),
    WithJsonSchema(
        {
            "type": "object",
            "maxProperties": MAX_BIASES,
            "propertyNames": {"type": "string", "format": TOKEN_ID},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        }
    ),
]


class StreamOptions(Message):
    """What a stream carries beside the text."""

    include_usage: bool | None = None
    """one more event at the end, with `usage` and no choices"""
    continuous_usage_stats: bool | None = None
    """usage so far in every event (of vLLM)"""


class ResponseFormat(Message):
    """The form of the answer: text."""

    type: Literal["text"]


class Sampling(Message):
    """Fields of completions and chat completions alike. Those after `logit_bias` are vLLM's."""

    model: str | None = Field(default=None, max_length=200)
    n: NumChoices | None = None
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    seed: Seed | None = None
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: LogitBias | None = None
    top_k: TopK | None = None
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=MIN_REPETITION, le=10)
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    stop_token_ids: StopTokens | None = None
    return_token_ids: bool | None = None
    """choices carry `token_ids`, and the answer the tokens of the prompt"""
    structured_outputs: Refused = None
    guided_json: Refused = None
    guided_choice: Refused = None
    guided_regex: Refused = None
    guided_grammar: Refused = None
    truncate_prompt_tokens: Refused = None
    prompt_logprobs: Refused = None
    """completions: `echo` with `logprobs`"""
    bad_words: Empty = None
    allowed_token_ids: Refused = None
    logits_processors: Empty = None
    include_stop_str_in_output: OnlyFalse = None
    skip_special_tokens: OnlyTrue = None
    return_tokens_as_token_ids: OnlyFalse = None
    use_beam_search: OnlyFalse = None
    length_penalty: OnlyOne = None
    best_of: One | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether the stream ends with usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class PromptDetails(Answer):
    """Of the tokens of the prompt."""

    cached_tokens: int


class Usage(Answer):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails | None = None

    @classmethod
    def of(cls, prompt: int, completion: int, cached: int | None = None) -> Usage:
        """Usage of so many tokens, `cached` of the prompt found in the cache."""
        details = None if cached is None else PromptDetails(cached_tokens=cached)
        return cls(
            prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion,
            prompt_tokens_details=details,
        )  # fmt: skip


class ErrorDetail(Answer):
    """What is wrong: for people, the kind, the field, and a code for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Answer):
    """OpenAI's error object."""

    error: ErrorDetail


class ModelCard(Answer):
    """One model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "skymoe"
    max_model_len: int


class ModelList(Answer):
    """All models: one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
