"""`/tokenize` and `/detokenize`, as in vLLM."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, RootModel

from skymoe.serve.protocol.chat import MAX_MESSAGES, ChatMessage
from skymoe.serve.protocol.common import Answer, Message, TokenList


class TokenizeText(Message):
    """Text to cut into tokens."""

    model: str | None = Field(default=None, max_length=200)
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool | None = None


class TokenizeChat(Message):
    """A conversation to cut into tokens, by the template of the model."""

    model: str | None = Field(default=None, max_length=200)
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None


class TokenizeRequest(RootModel[TokenizeText | TokenizeChat]):
    """Text, or a conversation."""


class TokenizeAnswer(Answer):
    """The tokens."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Message):
    """Tokens to make text of."""

    model: str | None = Field(default=None, max_length=200)
    tokens: TokenList


class DetokenizeAnswer(Answer):
    """The text."""

    prompt: str
