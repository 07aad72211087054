"""Token files in Megatron's layout, `prefix.bin` and `prefix.idx` (skymoe.data.layout): writer and mapped reader.

Files that Megatron-LM wrote open here, and ours open there. We write one sequence per document. Beside them lies a
sidecar `prefix.json` of our own: counts, and a fingerprint, the SHA-256 of the .bin followed by the .idx. A foreign
pair without one is used too; see `IndexedDataset.fingerprint`.

The reader trusts nothing: every length and offset is checked against the size of both files before one token is read,
so a broken or hostile pair is a FormatError when it is opened, never a crash in step 4000. What it cannot see is a file
that shrinks while it is open, and a flipped bit among the tokens: `verify()` finds the latter by hashing everything.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from skymoe.base.errors import ConfigError, FormatError
from skymoe.base.files import machine_errors, write_atomic
from skymoe.data.layout import (
    BLOCK,
    CODES,
    HEADER,
    check_documents,
    check_sequences,
    pack_index,
    read_header,
    regular_size,
    sibling,
)
from skymoe.data.sidecar import Sidecar, read_sidecar

_MAX_LENGTH = 2**31 - 1

Tokens = npt.NDArray[np.number]


class IndexedWriter:
    """Writes one token file, a document at a time. A context manager: leaving it without `finish` leaves no file.

    Tokens go to disk as they come and are hashed on the way; memory holds twelve bytes per document. Nothing stands
    under its final name before `finish`: the .idx, without which nothing opens, comes last.

    Args:
        prefix: both files without their suffix; neither may exist.
        dtype: of the stored tokens, one of the eight that Megatron knows.
    """

    def __init__(self, prefix: Path, dtype: npt.DTypeLike) -> None:
        self.prefix = Path(prefix)
        wanted: np.dtype[Any] = np.dtype(dtype).newbyteorder("<")
        if wanted not in CODES:
            raise ConfigError(f"tokens cannot be stored as {wanted}", where=prefix)
        self.dtype: np.dtype[np.number] = wanted
        if taken := [suffix for suffix in (".bin", ".idx", ".json") if sibling(self.prefix, suffix).exists()]:
            raise ConfigError(f"{' and '.join(taken)} exist already", where=prefix, hint="choose another name")
        self.num_tokens = 0
        self._lengths, self._document_indices = array("i"), array("q", [0])
        self._digest = hashlib.sha256()
        self._partial = sibling(self.prefix, ".bin.partial")
        with machine_errors(self._partial):
            self._file = self._partial.open("xb")

    @property
    def num_documents(self) -> int:
        """Documents ended so far."""
        return len(self._document_indices) - 1

    def add_sequence(self, tokens: npt.ArrayLike) -> None:
        """Append one sequence (one-dimensional) to the open document.

        Raises:
            FormatError: a token does not fit the dtype, or the sequence is longer than 2^31 - 1.
        """
        values = np.asarray(tokens)
        stored = values.astype(self.dtype)
        if values.ndim != 1 or len(values) > _MAX_LENGTH:
            raise FormatError(f"a sequence of shape {values.shape} cannot be stored", where=self.prefix)
        if values.dtype != self.dtype and not np.array_equal(stored, values):
            raise FormatError(f"a token does not fit {self.dtype}", where=self.prefix)
        data = stored.tobytes()
        with machine_errors(self._partial):
            self._file.write(data)
        self._digest.update(data)
        self._lengths.append(len(values))
        self.num_tokens += len(values)

    def end_document(self) -> None:
        """The sequences added since the last call are one document."""
        self._document_indices.append(len(self._lengths))

    def add_document(self, tokens: npt.ArrayLike) -> None:
        """One document that is one sequence."""
        self.add_sequence(tokens)
        self.end_document()

    def finish(self, *, name: str = "", text_bytes: int | None = None, tokenizer_sha256: str | None = None) -> Sidecar:
        """Write index and sidecar, push everything to the disk, give the files their names.

        Args:
            name: what the data set is called; default: the last part of the prefix.
            text_bytes: length in UTF-8 of the text behind the tokens.
            tokenizer_sha256: of the tokenizer.json that made them.
        """
        if self._document_indices[-1] != len(self._lengths):
            self.end_document()
        index = pack_index(self.dtype, np.array(self._lengths), np.array(self._document_indices))
        self._digest.update(index)
        sidecar = Sidecar(
            name=name or self.prefix.name,
            tokens=self.num_tokens,
            documents=self.num_documents,
            bytes=text_bytes,
            fingerprint=self._digest.hexdigest(),
            tokenizer_sha256=tokenizer_sha256,
        )
        with machine_errors(self._partial):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._partial, sibling(self.prefix, ".bin"))
        write_atomic(sibling(self.prefix, ".json"), (sidecar.model_dump_json(indent=2) + "\n").encode())
        write_atomic(sibling(self.prefix, ".idx"), index)
        return sidecar

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)


class IndexedDataset:
    """A token file, mapped into memory; opening it reads the index only.

    Attributes:
        prefix: both files without their suffix.
        dtype: of the stored tokens.
        tokens: all tokens in one line, read-only, mapped.
        num_documents: how many documents there are.
        sidecar: our own counts and hashes; None beside a foreign file.

    Raises:
        FormatError: a file is missing, is no regular file, or index and tokens do not fit together.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = Path(prefix)
        self.bin_path, self.idx_path = sibling(self.prefix, ".bin"), sibling(self.prefix, ".idx")
        idx_bytes, bin_bytes = regular_size(self.idx_path), regular_size(self.bin_path)
        self.dtype, num_sequences, num_indices = read_header(self.idx_path, idx_bytes)
        index = np.memmap(self.idx_path, mode="r", dtype=np.uint8).view(np.ndarray)
        lengths_end = HEADER.size + 4 * num_sequences
        offsets_end = lengths_end + 8 * num_sequences
        self.lengths_S = index[HEADER.size : lengths_end].view("<i4")
        self._offsets_S = index[lengths_end:offsets_end].view("<i8")
        self._document_indices = index[offsets_end:].view("<i8")
        check_sequences(self.lengths_S, self._offsets_S, self.dtype.itemsize, bin_bytes, self.idx_path)
        check_documents(self._document_indices, num_sequences, self.idx_path)
        self.tokens: Tokens = _map_tokens(self.bin_path, self.dtype, bin_bytes)
        self.num_documents = num_indices - 1
        self.sidecar: Sidecar | None = read_sidecar(sibling(self.prefix, ".json"))
        self._check_sidecar()

    @property
    def num_tokens(self) -> int:
        """Tokens in all documents together."""
        return int(self.tokens.size)

    @cached_property
    def document_bounds(self) -> npt.NDArray[np.int64]:
        """Where each document begins, in tokens, and the end (D+1 entries, 8 bytes of memory each)."""
        bounds_S = np.append(self._offsets_S // self.dtype.itemsize, self.num_tokens)
        bounds: npt.NDArray[np.int64] = bounds_S[self._document_indices]
        return bounds

    @cached_property
    def fingerprint(self) -> str:
        """What identifies the content: the sidecar's SHA-256 of both files.

        Without a sidecar, `index:` and the SHA-256 of the .idx and of the first MB of the .bin: hashing terabytes at
        every start would be worse. It tells data sets apart; it does not prove that they are whole.
        """
        if self.sidecar is not None:
            return self.sidecar.fingerprint
        digest = hashlib.sha256(np.ascontiguousarray(self.tokens[: BLOCK // self.dtype.itemsize]).tobytes())
        with self.idx_path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
        return f"index:{digest.hexdigest()}"

    def document(self, number: int) -> Tokens:
        """The tokens of document `number` (a view). Raises IndexError."""
        if not 0 <= number < self.num_documents:
            raise IndexError(f"document {number} of {self.num_documents}")
        return self.tokens[self.document_bounds[number] : self.document_bounds[number + 1]]

    def verify(self) -> None:
        """Hash both files and compare. Raises FormatError when they changed or have no sidecar."""
        if self.sidecar is None:
            raise FormatError("there is no sidecar to verify against", where=sibling(self.prefix, ".json"))
        digest = hashlib.sha256()
        for path in (self.bin_path, self.idx_path):
            with path.open("rb") as file:
                while block := file.read(BLOCK):
                    digest.update(block)
        if digest.hexdigest() != self.sidecar.fingerprint:
            raise FormatError("the content changed after it was written", where=self.prefix, hint="build it again")

    def _check_sidecar(self) -> None:
        found = (self.num_tokens, self.num_documents)
        if self.sidecar is not None and found != (self.sidecar.tokens, self.sidecar.documents):
            raise FormatError(
                f"{found[0]} tokens in {found[1]} documents, but the sidecar says "
                f"{self.sidecar.tokens} in {self.sidecar.documents}",
                where=self.prefix,
                why="the sidecar belongs to other files",
            )


def _map_tokens(path: Path, dtype: np.dtype[np.number], size: int) -> Tokens:
    if size == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, mode="r", dtype=dtype).view(np.ndarray)
