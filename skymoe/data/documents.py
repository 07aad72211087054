"""Files of text -> documents, one at a time: txt, jsonl, parquet, source files, each also as .gz (parquet excepted).

Memory holds one document (or one parquet batch), whatever the size of the file. Documents longer than the limit are
cut at a line end, so a book of 10 GB in one txt file is many documents, not one that fills memory. What cannot be read
as text is refused with its file and line, or skipped and counted, as the user chose; binary source files are always
skipped, and so are hidden files and symbolic links in a directory.
"""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skymoe.base.errors import FormatError, MissingExtraError, SkymoeError, printable
from skymoe.base.strict_json import parse_json
from skymoe.data.config import BadDocument, BuildConfig, InputFormat, TextUnit
from skymoe.data.streams import cut_long, lines, open_text, paragraphs, pieces

_BY_SUFFIX = {
    ".txt": InputFormat.TXT, ".text": InputFormat.TXT, ".jsonl": InputFormat.JSONL, ".ndjson": InputFormat.JSONL,
    ".parquet": InputFormat.PARQUET,
}  # fmt: skip
_PARQUET_ROWS = 256


@dataclass(frozen=True)
class InputFile:
    """One file, how to read it, and its size on disk."""

    path: Path
    format: InputFormat
    size: int


def list_inputs(config: BuildConfig) -> list[InputFile]:
    """Every file of `config.inputs`, directories walked in sorted order. Raises FormatError."""
    found: list[InputFile] = []
    for path in config.inputs:
        if path.is_dir():
            candidates = [(name, _format(name, config)) for name in _walk(path)]
            found += [InputFile(name, kind, name.stat().st_size) for name, kind in candidates if kind is not None]
        elif path.is_file():
            kind = config.format if config.format is not InputFormat.AUTO else _format(path, config)
            if kind is None:
                raise FormatError("the suffix does not say how to read this file", where=path, hint="give format")
            found.append(InputFile(path, kind, path.stat().st_size))
        else:
            raise FormatError("there is no such file or directory", where=path)
    if not found:
        hint = f"suffixes taken: {' '.join([*_BY_SUFFIX, *config.extensions])}"
        raise FormatError("no file to read", where=", ".join(map(str, config.inputs)), hint=hint)
    return found


class DocumentReader:
    """Reads documents as `config` says.

    Attributes:
        skipped: reason -> how many were left out.
    """

    def __init__(self, config: BuildConfig) -> None:
        self._config = config
        self.skipped: Counter[str] = Counter()

    def read(self, file: InputFile) -> Iterator[str]:
        """The documents of one file, in order. Raises FormatError."""
        readers = {
            InputFormat.TXT: self._read_txt,
            InputFormat.SOURCE: self._read_source,
            InputFormat.JSONL: self._read_jsonl,
            InputFormat.PARQUET: self._read_parquet,
        }
        try:
            for text in readers[file.format](file.path):
                if text.strip():
                    yield from cut_long(text, self._config.max_document_bytes)
        except (OSError, EOFError, zlib.error) as error:  # a .gz that is none, or ends early; a disk that fails
            raise FormatError(f"cannot be read: {printable(error)}", where=file.path) from error

    def _read_txt(self, path: Path) -> Iterator[str]:
        unit = self._config.text_unit
        with open_text(path) as stream:
            groups = {
                TextUnit.FILE: pieces(stream, self._config.max_document_bytes),
                TextUnit.LINE: lines(stream, path),
                TextUnit.PARAGRAPH: paragraphs(lines(stream, path), self._config.max_document_bytes),
            }
            for number, data in enumerate(groups[unit], start=1):
                yield from self._decode(data, f"{path}, {unit} {number}")

    def _read_source(self, path: Path) -> Iterator[str]:
        with open_text(path) as stream:
            for data in pieces(stream, self._config.max_document_bytes):
                if b"\x00" in data:
                    self.skipped["binary file"] += 1
                    return
                yield from self._decode(data, str(path), always_skip=True)

    def _read_jsonl(self, path: Path) -> Iterator[str]:
        key = self._config.text_key
        with open_text(path) as stream:
            for number, line in enumerate(lines(stream, path), start=1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    record = parse_json(line, where=where)
                except FormatError as error:
                    self._refuse(error, "not JSON")
                    continue
                text = record.get(key) if isinstance(record, dict) else None
                if isinstance(text, str):
                    yield from self._encodable(text, where)
                else:
                    self._refuse(self._no_text(record, where), "no text")

    def _read_parquet(self, path: Path) -> Iterator[str]:
        arrow, key = _arrow(), self._config.text_key
        try:
            with arrow.parquet.ParquetFile(path) as table:
                if key not in table.schema_arrow.names:
                    columns = ", ".join(printable(name, 40) for name in table.schema_arrow.names[:20])
                    raise FormatError(f"no column {key!r}; there are: {columns}", where=path, hint="give text_key")
                for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=[key]):
                    for value in batch.column(0):
                        text = value.as_py()
                        if isinstance(text, str):
                            yield text
                        else:
                            self._refuse(FormatError(f"a row without text in {key!r}", where=path), "no text")
        except SkymoeError:
            raise
        except (arrow.ArrowException, OSError, ValueError) as error:
            raise FormatError(f"this parquet file cannot be read: {printable(error)}", where=path) from error

    def _decode(self, data: bytes, where: str, *, always_skip: bool = False) -> Iterator[str]:
        try:
            yield data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            refusal = FormatError(f"this is not UTF-8 (byte {error.start})", where=where)
            self._refuse(refusal, "not UTF-8", always_skip=always_skip)

    def _encodable(self, text: str, where: str) -> Iterator[str]:
        """JSON can hold half of a surrogate pair, which no UTF-8 text can."""
        try:
            text.encode()
        except UnicodeEncodeError:
            self._refuse(FormatError("the text holds a lone surrogate", where=where), "not UTF-8")
        else:
            yield text

    def _no_text(self, record: object, where: str) -> FormatError:
        keys = ", ".join(printable(key, 40) for key in list(record)[:20]) if isinstance(record, dict) else "no object"
        return FormatError(f"no text under {self._config.text_key!r}", where=where, why=f"there is: {keys}")

    def _refuse(self, error: FormatError, reason: str, *, always_skip: bool = False) -> None:
        if self._config.bad_documents is BadDocument.REFUSE and not always_skip:
            raise FormatError(error.what, where=error.where, why=error.why, hint="bad_documents: skip leaves it out")
        self.skipped[reason] += 1


def _walk(directory: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(directory):
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            if not name.startswith(".") and path.is_file() and not path.is_symlink():
                yield path


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _format(path: Path, config: BuildConfig) -> InputFormat | None:
    """How to read `path`, met in a directory; None when it is not one of the inputs."""
    suffix = _suffix(path)
    if config.format is InputFormat.SOURCE:
        return InputFormat.SOURCE if suffix in config.extensions else None
    if config.format is not InputFormat.AUTO:
        return config.format
    return _BY_SUFFIX.get(suffix) or (InputFormat.SOURCE if suffix in config.extensions else None)


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("reading parquet", "data") from error
    return pyarrow
