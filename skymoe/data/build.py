"""Documents -> token file: hold out by hash, tokenize in batches, end each document, write.

Whether a document is held out is decided by a hash of its text and the seed, nothing else: equal documents fall on the
same side, more data or another order moves nothing that is already placed, and no list has to be kept.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from skymoe.data.indexed import IndexedWriter
from skymoe.data.layout import token_dtype
from skymoe.data.tokenizer import TextTokenizer

_BATCH_CHARACTERS = 4_000_000


@dataclass(frozen=True)
class TokenFileReport:
    """What one token file holds. `prefix` opens with IndexedDataset; None when there was no document for it."""

    prefix: Path | None
    documents: int
    tokens: int
    text_bytes: int

    def moved(self, old: Path, new: Path) -> TokenFileReport:
        """The same file after directory `old` was renamed to `new`."""
        prefix = self.prefix and new / self.prefix.relative_to(old)
        return TokenFileReport(prefix, self.documents, self.tokens, self.text_bytes)


def hash_share(text: str, *parts: object) -> float:
    """A number in [0, 1) that depends on `text` and `parts` only, as good as random."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=repr(parts).encode()[:64])
    return int.from_bytes(digest.digest(), "big") / 2**64


class TextWriter:
    """Texts become one token file at `prefix`. Memory holds about four million characters.

    A context manager: leaving it without `finish` leaves no file.
    """

    def __init__(self, prefix: Path, tokenizer: TextTokenizer, name: str) -> None:
        self._tokenizer, self._name = tokenizer, name
        self._writer = IndexedWriter(prefix, token_dtype(tokenizer.vocab_size))
        self._texts: list[str] = []
        self._characters = self._bytes = 0

    def add(self, text: str) -> None:
        """One document."""
        self._texts.append(text)
        self._characters += len(text)
        if self._characters >= _BATCH_CHARACTERS:
            self._flush()

    def finish(self) -> TokenFileReport:
        """Write what is left and the index. Without any document there is no file."""
        self._flush()
        writer = self._writer
        if writer.num_documents == 0:
            return TokenFileReport(None, 0, 0, 0)
        writer.finish(name=self._name, text_bytes=self._bytes, tokenizer_sha256=self._tokenizer.sha256)
        return TokenFileReport(writer.prefix, writer.num_documents, writer.num_tokens, self._bytes)

    def _flush(self) -> None:
        for text, tokens in zip(
            self._texts, self._tokenizer.encode_documents(self._texts, self._writer.dtype), strict=True
        ):
            self._writer.add_document(tokens)
            self._bytes += len(text.encode())
        self._texts.clear()
        self._characters = 0

    def __enter__(self) -> Self:
        self._writer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)
