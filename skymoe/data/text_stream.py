"""Tokens -> text while they come: only whole characters leave, and what has left never changes.

A character may be spread over several tokens, a token may end inside one, some decoders take the space before the first
word away, and those with a byte fallback turn a whole run of bytes into replacement characters while its last character
is incomplete. So a window of tokens is decoded again with every new one, and replacement characters at its end are held
back until they turn into something else, or until it is clear that they never will.

The window is short whatever the tokens are: a prompt or an answer of broken characters only, which a client can ask
for, costs no more per token than a text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_OPEN = 3  # bytes, so tokens, of a character that is not complete yet
_WINDOW = 48
_CONTEXT = 8
_LONGEST_WINDOW = 4 * _WINDOW  # where no cut leaves the text as it is; no tokenizer that we know of comes here


class TextStream:
    """Decodes a growing sequence of tokens piece by piece.

    Args:
        decode: ids to text, for instance `TextTokenizer.decode`.
        prompt_ids: what came before; it is never part of a piece.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt_ids: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(prompt_ids[-_LONGEST_WINDOW:])
        self._held = 0  # tokens in a row whose text ended with a replacement character
        text = decode(self._window)
        self._shown = len(text)  # characters of the window's text that have left
        self._shorten(text)

    def push(self, token: int) -> str:
        """The text that `token` completes; often a word, sometimes nothing."""
        self._window.append(token)
        text = self._decode(self._window)
        num_open = len(text) - len(text.rstrip(_REPLACEMENT))
        self._held = self._held + 1 if num_open else 0
        piece = self._take(text, len(text) - (min(num_open, _MAX_OPEN) if self._held > _MAX_OPEN else num_open))
        if len(self._window) > _WINDOW and (not num_open or self._held > _MAX_OPEN):
            self._shorten(text)
        return piece

    def finish(self) -> str:
        """What is still held back, with replacement characters for bytes that never became a character."""
        text = self._decode(self._window)
        return self._take(text, len(text))

    def _take(self, text: str, end: int) -> str:
        piece = text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece

    def _shorten(self, text: str) -> None:
        """Keep the last few tokens, cut where what they decode to is the end of `text`, so at a whole character."""
        num_open = len(text) - self._shown
        for size in range(_CONTEXT, 2 * _CONTEXT):
            tail = self._decode(self._window[-size:])
            if text.endswith(tail) and len(tail) >= num_open:
                break
        else:
            if len(self._window) < _LONGEST_WINDOW:
                return
        self._window = self._window[-size:]
        self._shown = max(len(tail) - num_open, 0)


def for_terminal(text: str) -> str:
    """`text` with control characters made visible, except tabs and line ends: a model must not command a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
