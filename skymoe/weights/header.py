"""The safetensors container: one file, its header, and the bytes of its tensors. No torch.

A file is `<u64 length> <JSON header> <data>`; the header names each tensor with dtype, shape and byte range. We parse
it ourselves because the file comes from strangers and the reference library is generous: it lets the last of two equal
names win and takes `../../etc/passwd`, control characters and a shape of (2**62, 0). Here a header is refused unless

- it is at most 100 MB of strict JSON (no duplicate key, no NaN, bounded nesting) that begins with `{`;
- every name is printable ASCII without `..`, every dimension a whole number, every element count bounded;
- the byte ranges agree with dtype and shape, and fill the data without a hole, an overlap or a byte left over.

So a name that passes can be printed, and a range that passes can be read. What is left out: `U16`, `U32`, `U64`,
complex and sub-byte formats, which no model of ours stores; they are refused by name.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from threading import Lock
from typing import Self, cast

from skymoe.base.dtype import DType
from skymoe.base.errors import FormatError, printable
from skymoe.base.strict_json import parse_json

MAX_HEADER_BYTES = 100_000_000
CHUNK_BYTES = 8 * 2**20  # of one read: large enough for full speed, small enough for a cache
_MAX_ELEMENTS = 2**44  # of one tensor, counting empty dimensions as 1: above every model, below every overflow
_MAX_DIMS = 8
_NAME_RULE = "names are printable ASCII without spaces, quotes, backslashes or '..'"
_NAME = re.compile(r"[A-Za-z0-9_][!#-\[\]-~]{0,511}")  # printable ASCII without space, quote and backslash


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor: element type and shape."""

    dtype: DType
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """The product of the dimensions."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the data."""
        return self.num_elements * self.dtype.itemsize


@dataclass(frozen=True)
class Header:
    """A checked header.

    Attributes:
        tensors: name to dtype and shape, in the order of the data.
        offsets: name to the first byte of its data, counted from the beginning of the *file*.
        metadata: the free strings of `__metadata__`.
        num_bytes: size of the whole file.
    """

    tensors: Mapping[str, TensorInfo]
    offsets: Mapping[str, int]
    metadata: Mapping[str, str]
    num_bytes: int


def is_safe_name(name: str) -> bool:
    """Whether a tensor may be called `name`: printable ASCII, no space, no `..`, at most 512 characters."""
    return _NAME.fullmatch(name) is not None and ".." not in name


class TensorFile:
    """One safetensors file, open for reading. A context manager.

    The file stays open, so that the bytes read are those of the file whose header was checked even when another file
    takes its name meanwhile. Several threads may read at once.

    Raises:
        FormatError: the file is missing, is not a regular file, or its header is broken or hostile.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = Lock()
        with _read_errors(path):
            self._file = _open_regular(path)
            try:
                self.header = _read_header(self._file, path)
            except BaseException:
                self.close()
                raise

    def read_into(self, name: str, buffer: memoryview, *, start: int = 0) -> None:
        """Fill `buffer` with the bytes of tensor `name` from byte `start` of it on.

        Raises:
            FormatError: the file has become shorter since it was opened.
            KeyError: no such tensor.
        """
        assert start >= 0 and start + len(buffer) <= self.header.tensors[name].num_bytes
        done = 0
        with self._lock, _read_errors(self.path):
            self._file.seek(self.header.offsets[name] + start)
            while done < len(buffer):
                count = self._file.readinto(buffer[done : done + CHUNK_BYTES])
                if not count:
                    raise FormatError(f"the file ends within tensor {name}", where=self.path, why="it has shrunk")
                done += count

    def chunks(self, name: str, size: int = CHUNK_BYTES) -> Iterator[memoryview]:
        """The bytes of tensor `name` in pieces of at most `size`; a piece is valid until the next one is asked for."""
        total, buffer = self.header.tensors[name].num_bytes, memoryview(bytearray(size))
        for start in range(0, total, size):
            piece = buffer[: min(size, total - start)]
            self.read_into(name, piece, start=start)
            yield piece

    def sha256(self, name: str) -> str:
        """SHA-256 of the bytes of tensor `name`, in hexadecimal."""
        digest = hashlib.sha256()
        for piece in self.chunks(name):
            digest.update(piece)
        return digest.hexdigest()

    def close(self) -> None:
        """Close the file; harmless twice."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def plan_file(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> tuple[bytes, Header]:
    """The header bytes of a file that will hold `tensors`, and where each one's data goes.

    Wider element types come first (otherwise in the order given), so that every tensor lies aligned to its own element:
    readers that map the file need that. The header ends on a multiple of 8, padded with spaces as the format allows.
    """
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    fields: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        if not is_safe_name(name):
            raise FormatError(f"a tensor cannot be called {printable(repr(name), 80)}", why=_NAME_RULE)
        begin, end = end, end + tensors[name].num_bytes
        dtype, shape = tensors[name].dtype.safetensors_name, list(tensors[name].shape)
        fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise FormatError(f"a header of {len(text)} bytes is over the format's limit", hint="use smaller shards")
    return len(text).to_bytes(8, "little") + text, _layout(tensors, order, metadata, 8 + len(text))


def _layout(tensors: Mapping[str, TensorInfo], order: list[str], metadata: Mapping[str, str], start: int) -> Header:
    offsets = {}
    for name in order:
        offsets[name] = start
        start += tensors[name].num_bytes
    return Header({name: tensors[name] for name in order}, offsets, dict(metadata), start)


def write_all(file: FileIO, data: memoryview | bytes) -> None:
    """Write all of `data` at the file's position; one `write` may take less than it is given."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file.fileno(), rest[:CHUNK_BYTES]) :]


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise FormatError("there is no such file", where=path) from error
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", where=path) from error


def _open_regular(path: Path) -> FileIO:
    if not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO would wait for ever
        raise FormatError("this is not a regular file", where=path)
    return FileIO(path, "rb")


def _read_header(file: FileIO, path: Path) -> Header:
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8) or b""
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or 8 + length > size:
        raise FormatError("the file is cut off", where=path, why=f"{size} bytes do not even hold the header")
    if length > MAX_HEADER_BYTES:
        raise FormatError(f"the header claims {length} bytes", where=path, why=f"the limit is {MAX_HEADER_BYTES}")
    first = file.read(min(length, 1)) or b""
    if first != b"{":  # before the rest is read
        raise FormatError("this is not a safetensors file", where=path, why="its header does not begin with '{'")
    fields = cast("dict[str, object]", parse_json(first + (file.read(length - 1) or b""), where=path))
    metadata = _metadata(fields.pop("__metadata__", {}), path)
    entries = {name: _entry(name, value, path) for name, value in fields.items()}
    order = sorted(entries, key=lambda name: (entries[name][1], entries[name][2]))
    _check_ranges(entries, order, size - 8 - length, path)
    return _layout({name: entries[name][0] for name in order}, order, metadata, 8 + length)


def _metadata(value: object, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise FormatError("__metadata__ must map strings to strings", where=path)
    return value


def _entry(name: str, value: object, path: Path) -> tuple[TensorInfo, int, int]:
    """Dtype and shape, begin and end of one tensor, each checked by itself."""
    if not is_safe_name(name):
        raise FormatError(f"a tensor is called {printable(repr(name), 80)}", where=path, why=_NAME_RULE)
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"tensor {name}: expected dtype, shape and data_offsets", where=path)
    shape, offsets = value["shape"], value["data_offsets"]
    try:
        dtype = DType.from_safetensors(value["dtype"])
    except (KeyError, TypeError):
        known = ", ".join(dtype.safetensors_name for dtype in DType)
        shown = printable(repr(value["dtype"]), 40)
        raise FormatError(f"tensor {name}: dtype {shown} is not read", where=path, why=f"we read {known}") from None
    if not _are_counts(shape) or len(shape) > _MAX_DIMS or math.prod(max(dim, 1) for dim in shape) > _MAX_ELEMENTS:
        raise FormatError(f"tensor {name}: impossible shape {printable(shape, 80)}", where=path)
    if not _are_counts(offsets) or len(offsets) != 2:
        raise FormatError(f"tensor {name}: impossible data_offsets {printable(offsets, 80)}", where=path)
    info = TensorInfo(dtype, tuple(shape))
    if offsets[1] - offsets[0] != info.num_bytes:
        why = f"{info.dtype} of shape {list(info.shape)} takes {info.num_bytes}"
        raise FormatError(f"tensor {name}: its range holds {offsets[1] - offsets[0]} bytes", where=path, why=why)
    return info, offsets[0], offsets[1]


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_ranges(
    entries: Mapping[str, tuple[TensorInfo, int, int]], order: Sequence[str], num_bytes: int, path: Path
) -> None:
    """The ranges must fill the data exactly, in some order."""
    end = 0
    for name in order:
        _, begin, next_end = entries[name]
        if begin != end:
            problem = "overlaps the tensor before it" if begin < end else "leaves a hole before it"
            raise FormatError(f"tensor {name} {problem} (byte {begin} of the data, expected {end})", where=path)
        end = next_end
    if end != num_bytes:
        problem = "is cut off" if end > num_bytes else "has bytes that belong to no tensor"
        raise FormatError(f"the file {problem}: {num_bytes} bytes of data, {end} expected", where=path)
