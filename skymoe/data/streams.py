"""Byte streams in bounded pieces: lines, paragraphs, and pieces of limited size that end where a line ends."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from skymoe.base.errors import FormatError

_MAX_LINE = 1 << 28


def cut_long(text: str, max_bytes: int) -> Iterator[str]:
    """`text` whole, or in pieces of at most `max_bytes` of UTF-8, cut after a line end where there is one."""
    if len(text) * 4 <= max_bytes or len(data := text.encode()) <= max_bytes:
        yield text
        return
    yield from (piece.decode() for piece in pieces(io.BytesIO(data), max_bytes))


def pieces(stream: BinaryIO, max_bytes: int) -> Iterator[bytes]:
    """The stream in pieces of at most `max_bytes` (4 or more), cut after a newline, else between two characters."""
    rest = b""
    while data := rest + stream.read(max_bytes - len(rest)):
        if len(data) < max_bytes:
            yield data
            return
        end = data.rfind(b"\n") + 1 or _last_character(data)
        rest = data[end:]
        yield data[:end]


def _last_character(data: bytes) -> int:
    """Where the last character of `data` begins, which may lie across its end. Never 0: a piece holds something."""
    start = len(data) - 1
    while start > max(0, len(data) - 4) and data[start] & 0xC0 == 0x80:  # a continuation byte of UTF-8
        start -= 1
    return start or len(data)


def lines(stream: BinaryIO, path: Path) -> Iterator[bytes]:
    """The lines, ends kept. Raises FormatError for one that would fill memory."""
    while line := stream.readline(_MAX_LINE):
        if len(line) == _MAX_LINE:
            raise FormatError(f"a line is longer than {_MAX_LINE} bytes", where=path)
        yield line


def paragraphs(lines: Iterable[bytes], max_bytes: int) -> Iterator[bytes]:
    """Runs of lines that are not blank, of about `max_bytes` at most."""
    run: list[bytes] = []
    size = 0
    for line in lines:
        if line.strip():
            run.append(line)
            size += len(line)
        if run and (size >= max_bytes or not line.strip()):
            yield b"".join(run)
            run, size = [], 0
    if run:
        yield b"".join(run)


def open_text(path: Path) -> BinaryIO:
    """The file, unpacked when its name ends in .gz. Raises FormatError."""
    try:
        return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", where=path) from error
