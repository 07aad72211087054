r"""One token as text and as bytes, and where it begins: what log-probabilities are reported with. No torch.

Tokens do not end where characters do. A token that is no whole text on its own is written as OpenAI's completions write
it, `bytes:\xe4\xb8`: so no two parts of characters share a name, and a client that looks for the most likely token
among `top_logprobs` finds the right one. (vLLM writes U+FFFD for all of them.) `bytes` are the token's own, also there.

`text_offset` counts characters of the text, and a character belongs to the token that completes it.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from skymoe.data.tokenizer import TextTokenizer
from skymoe.engine.output import TokenLogprobs


@dataclass(frozen=True, slots=True)
class TokenText:
    """A token. `text` names it uniquely; `bytes` are what it adds to the text."""

    id: int
    text: str
    bytes: bytes


@dataclass(frozen=True, slots=True)
class LogprobText:
    """A token of a text with its log-probability.

    Attributes:
        token: itself.
        offset: of the first character of the text that it takes part in.
        logprob, rank: None for the first token of a prompt, which nothing predicts.
        top: the most likely tokens at this position, best first.
    """

    token: TokenText
    offset: int
    logprob: float | None = None
    rank: int | None = None
    top: tuple[tuple[TokenText, float], ...] = ()


class TokenTexts:
    """The texts of single tokens of a tokenizer."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = tokenizer.special_ids

    def of(self, token_id: int) -> TokenText:
        """One token; an id without a token is written `token_id:7`, as in vLLM."""
        raw = self._tokenizer.bytes_by_id.get(token_id)
        if raw is None:
            text = self._tokenizer.decode([token_id])
            return TokenText(token_id, text or f"token_id:{token_id}", text.encode())
        try:
            return TokenText(token_id, raw.decode(), raw)
        except UnicodeDecodeError:
            return TokenText(token_id, "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw)

    def line(self, offset: int) -> TokenLine:
        """Tokens one after the other, the first at character `offset`."""
        return TokenLine(self, offset)

    def is_special(self, token_id: int) -> bool:
        """Whether the token adds nothing to a text."""
        return token_id in self._special


class TokenLine:
    """Consecutive tokens, each with the place where it begins in their text."""

    def __init__(self, texts: TokenTexts, offset: int) -> None:
        self._texts = texts
        self._offset = offset
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int, logprobs: TokenLogprobs | None) -> LogprobText:
        """The next token."""
        token, offset = self._texts.of(token_id), self._offset
        if not self._texts.is_special(token_id):
            self._offset += len(self._decoder.decode(token.bytes))
        if logprobs is None:
            return LogprobText(token, offset)
        top = tuple((self._texts.of(other), value) for other, value in logprobs.top)
        return LogprobText(token, offset, logprobs.logprob, logprobs.rank, top)


def completion_logprobs(entries: Iterable[LogprobText]) -> dict[str, Any]:
    """As `/v1/completions` has them. The chosen token is among `top_logprobs`, also when others are more likely."""
    entries = list(entries)
    tops = [
        None if e.logprob is None else {token.text: value for token, value in e.top} | {e.token.text: e.logprob}
        for e in entries
    ]
    return {
        "tokens": [e.token.text for e in entries],
        "token_logprobs": [e.logprob for e in entries],
        "top_logprobs": tops,
        "text_offset": [e.offset for e in entries],
    }


def chat_logprobs(entries: Iterable[LogprobText]) -> dict[str, Any]:
    """As `/v1/chat/completions` has them."""
    return {
        "content": [
            _entry(e.token, e.logprob) | {"top_logprobs": [_entry(token, value) for token, value in e.top]}
            for e in entries
        ]
    }


def _entry(token: TokenText, logprob: float | None) -> dict[str, Any]:
    return {"token": token.text, "bytes": list(token.bytes), "logprob": logprob}
