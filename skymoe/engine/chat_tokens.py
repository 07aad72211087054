"""A rendered conversation -> token ids: special tokens of the template are tokens, those that a client wrote are text.

A template and a client write into one text, and `<|im_start|>` looks the same from both; transformers takes both for
the special token, so a client can end its own message and begin a system message. Here the template's special tokens
never look like text: in the parsed template each is replaced by a mark, a random number that is drawn when the template
is loaded and that no client ever sees. Whatever a template then does with the client's text (trim, split, put two
messages beside each other), only marks become special tokens. The client's text itself is not touched, so a template
sees it as transformers would.

Some templates put a special token together from parts: `'<|' + message.role + '|>'`. Which ones is found out when the
template is loaded, with conversations of random letters. Only for such templates, the client's text gets joints (marks
that are taken out again) inside everything that could stand for a part of these tokens.

Text is then encoded between special tokens, as the library does it. Should a vocabulary still have a way to write a
special token as text (a unigram model that lists it as a word), the text is cut inside it and encoded again.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

from skymoe.base.errors import ConfigError
from skymoe.data.tokenizer import TextTokenizer

_JOINT = 999_999


class ChatTokens:
    """Marks, and what becomes of them.

    Args:
        tokenizer: of the model.
        names: texts of special tokens that the model directory names beside those its tokenizer marks so.
    """

    def __init__(self, tokenizer: TextTokenizer, names: Collection[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._added = tokenizer.backend.get_added_tokens_decoder()
        found = {str(self._added[number].content): number for number in sorted(tokenizer.special_ids)}
        named = {name: tokenizer.backend.token_to_id(name) for name in names}
        found |= {name: number for name, number in named.items() if name and number is not None}
        self.texts = list(found)[:_JOINT]
        self.nonce = str(secrets.randbelow(9 * 10**38) + 10**38)
        self._ids = list(found.values())
        self._control = frozenset({*self._ids, tokenizer.eos_id}) - _unknown_id(tokenizer)
        self._mark = re.compile(self.nonce + r"(\d{6})")
        self._joint = f"{self.nonce}{_JOINT}"
        self._composed: dict[str, int] = {}
        self._beginnings = self._parts = _any_of(())

    # ---- special tokens that a template puts together

    def compose(self, rendered: str) -> None:
        """Learn from a conversation of random letters which special tokens the template puts together."""
        for text in _any_of(self.texts).findall(self._mark.sub("\0", rendered)):
            self._composed[text] = self._ids[self.texts.index(text)]
        self._beginnings = _any_of({text[:2] for text in self._composed})
        self._parts = _any_of({part for text in self._composed for part in (text[:2], text[2:-2]) if len(part) > 1})

    def guarded(self, value: Any) -> Any:
        """A client's value, as the template gets it: as it is, unless the template puts tokens together.

        Then a joint goes into whatever could be the beginning or the middle of such a token, and into beginnings alone
        where a text is the name of something: a template has to find `tool_calls`.
        """
        if not self._composed:
            return value
        if isinstance(value, str):
            return self._parts.sub(self._with_joint, value)
        if isinstance(value, Mapping):
            return {self._beginnings.sub(self._with_joint, key): self.guarded(item) for key, item in value.items()}
        return [self.guarded(item) for item in value] if isinstance(value, (list, tuple)) else value

    def _with_joint(self, match: re.Match[str]) -> str:
        return match[0][0] + self._joint + match[0][1:]

    # ---- ids

    def text(self, rendered: str) -> str:
        """`rendered` as a reader wants it: marks as the tokens they stand for."""
        return self._mark.sub(lambda match: "" if int(match[1]) == _JOINT else self.texts[int(match[1])], rendered)

    def ids(self, rendered: str) -> list[int]:
        """The token ids of `rendered`."""
        ids: list[int] = []
        parts = self._split(rendered)
        for i, part in enumerate(parts):
            if isinstance(part, int):
                ids.append(part)
                continue
            before, after = parts[i - 1] if i else None, parts[i + 1] if i + 1 < len(parts) else None
            if isinstance(before, int) and before in self._added and self._added[before].rstrip:
                part = part.lstrip()
            if isinstance(after, int) and after in self._added and self._added[after].lstrip:
                part = part.rstrip()
            ids += self._plain(part, is_first=i == 0)
        return ids

    def _split(self, rendered: str) -> list[str | int]:
        """Texts and special tokens, in order; no two texts beside each other."""
        composed = "".join(f"|{re.escape(text)}" for text in sorted(self._composed, key=len, reverse=True))
        pattern = re.compile(rf"{self.nonce}(\d{{6}}){composed}")
        parts: list[str | int] = [""]
        at = 0
        for match in pattern.finditer(rendered):
            parts.append(_joined(parts, rendered[at : match.start()]))
            at = match.end()
            if match[1] is None:
                parts.append(self._composed[match[0]])
            elif int(match[1]) < len(self._ids):
                parts.append(self._ids[int(match[1])])
        parts.append(_joined(parts, rendered[at:]))
        return [part for part in parts if part != ""]

    def _plain(self, text: str, *, is_first: bool) -> list[int]:
        """The ids of a text that has no special token, whatever is written in it."""
        pieces = [text]
        while True:
            backends = [self._backend(is_first and i == 0) for i in range(len(pieces))]
            pairs = list(zip(backends, pieces, strict=True))
            # batches of one let other threads run, and so does the end of an encoding without offsets
            fast = [own.encode_batch_fast([piece], add_special_tokens=False)[0].ids for own, piece in pairs]
            if not any(token in self._control for ids in fast for token in ids):
                return [int(token) for ids in fast for token in ids]
            encodings = [own.encode_batch([piece], add_special_tokens=False)[0] for own, piece in pairs]
            cut = [part for piece, enc in zip(pieces, encodings, strict=True) for part in self._cut(piece, enc)]
            if cut == pieces:  # a token that stands for none of the text
                return [int(t) for encoding in encodings for t in encoding.ids if t not in self._control]
            pieces = cut

    def _cut(self, text: str, encoding: Any) -> list[str]:
        """`text` in pieces: cut inside each special token, one of a single character taken out."""
        pieces, at = [], 0
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token in self._control:
                middle = (start + end) // 2
                pieces.append(text[at:middle])
                at = middle if start < middle < end else end
        return [piece for piece in [*pieces, text[at:]] if piece]

    def _backend(self, is_first: bool) -> Any:
        return self._tokenizer.backend if is_first else self._continuing

    @cached_property
    def _continuing(self) -> Any:
        """The tokenizer for a text that is not at the beginning: some put a space before the first text only."""
        backend = self._tokenizer.backend
        content = json.loads(self._tokenizer.json)
        if not _never_first(content.get("pre_tokenizer")):
            return backend
        made = type(backend).from_str(json.dumps(content))
        made.no_padding()
        made.no_truncation()
        made.encode_special_tokens = True
        return made


def _any_of(texts: Collection[str]) -> re.Pattern[str]:
    """Finds any of `texts`, the longest where several begin; nothing if there are none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) if texts else "(?!)")


def _joined(parts: list[str | int], text: str) -> str:
    """`text` with the text that is the last of `parts`, which is taken from there."""
    return str(parts.pop()) + text if parts and isinstance(parts[-1], str) else text


def _never_first(step: Any) -> bool:
    """Turn `prepend_scheme: first` of a pre-tokenizer into `never`; whether there was one."""
    if not isinstance(step, dict):
        return False
    if step.get("type") == "Metaspace" and step.get("prepend_scheme") == "first":
        step["prepend_scheme"] = "never"
        return True
    return any([_never_first(member) for member in step.get("pretokenizers") or []])


def _unknown_id(tokenizer: TextTokenizer) -> set[int]:
    """The token for what the vocabulary lacks: text may well become that one."""
    model = json.loads(tokenizer.json).get("model") or {}
    name, number = model.get("unk_token"), model.get("unk_id")
    found = tokenizer.backend.token_to_id(name) if isinstance(name, str) else number
    return {found} - {tokenizer.eos_id} if isinstance(found, int) else set()


def check_text(value: Any) -> None:
    """Refuse half a surrogate pair, which JSON can spell and no tokenizer takes. Raises ConfigError."""
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise ConfigError("a message holds half a surrogate pair, which is no text")
    if isinstance(value, Mapping):
        for key, item in value.items():
            check_text(key)
            check_text(item)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            check_text(item)
