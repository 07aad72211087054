"""`/v1/chat/completions`: text in, text out. Tools, images, audio and grammars are refused by name."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from skymoe.serve.protocol.common import Answer, Message, Positive, ResponseFormat, Sampling, TopLogprobs, Usage
from skymoe.serve.protocol.told import Empty, EmptyObject, OnlyFalse, Refused

MAX_MESSAGES = 1024
MAX_PARTS = 64


class TextPart(Message):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(Message):
    """Who says what."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS)]
    name: str | None = Field(default=None, max_length=64)
    tool_calls: Empty = None

    @property
    def text(self) -> str:
        """The content, its parts joined."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class ChatRequest(Sampling):
    """A conversation to continue."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Positive | None = None
    """the older name of `max_completion_tokens`"""
    max_completion_tokens: Positive | None = None
    """default: until the context is full"""
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    """with `logprobs`"""
    response_format: ResponseFormat | None = None
    add_generation_prompt: bool | None = None
    """end the prompt where the model is to speak; default: true"""
    tools: Empty = None
    functions: Empty = None
    tool_choice: Literal["none", "auto"] | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    audio: Refused = None
    web_search_options: Refused = None
    documents: Empty = None
    chat_template: Refused = None
    chat_template_kwargs: EmptyObject = None
    continue_final_message: OnlyFalse = None
    add_special_tokens: OnlyFalse = None
    echo: OnlyFalse = None


class TopLogprob(Answer):
    """A token that could have stood there."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token of the answer, and what else could have stood there."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    """Log-probabilities of the answer, token by token."""

    content: list[TokenLogprob]


class AnswerMessage(Answer):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Answer):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"]
    token_ids: list[int] | None = None
    """the tokens written, with the one that ended the text; with `return_token_ids`"""


class ChatAnswer(Answer):
    """The answers."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None


class ChatChunkChoice(Answer):
    """What is new of one answer."""

    index: int
    delta: dict[Literal["role", "content"], str]
    """the role first, then text"""
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    token_ids: list[int] | None = None


class ChatChunk(Answer):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None
    """in the first event; with `return_token_ids`"""
