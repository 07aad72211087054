"""Megatron's token files, byte by byte: what an index may say, checked before anything is believed.

    .bin   tokens, nothing else
    .idx   "MMIDIDX" and two zero bytes | u64 version = 1 | u8 dtype code | u64 S | u64 D+1
           i32 lengths (S) | i64 byte offsets (S) | i64 document indices (D+1)

S sequences; document d is the sequences [indices[d], indices[d+1]). Little-endian, no padding, as Megatron-LM writes it
(`megatron/core/datasets/indexed_dataset.py`). Left out: the multimodal variant (a mode per sequence).
"""

from __future__ import annotations

import stat
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from skymoe.base.errors import FormatError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype[np.number]] = {
    code: np.dtype(name) for code, name in enumerate(("<u1", "<i1", "<i2", "<i4", "<i8", "<f8", "<f4", "<u2"), start=1)
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
BLOCK = 1 << 20  # index entries checked, bytes hashed at a time


def token_dtype(vocab_size: int) -> np.dtype[np.number]:
    """The dtype Megatron picks for a vocabulary: uint16 below 65500 ids, else int32."""
    return np.dtype("<u2") if vocab_size < 65_500 else np.dtype("<i4")


def sibling(prefix: Path, suffix: str) -> Path:
    """`prefix` + `suffix`. Path.with_suffix would eat a dot inside the name ("web-0.5")."""
    return prefix.with_name(prefix.name + suffix)


def pack_index(dtype: np.dtype[np.number], lengths: npt.ArrayLike, document_indices: npt.ArrayLike) -> bytes:
    """The bytes of an .idx: sequences of `lengths` tokens, one after another."""
    lengths_S, indices = np.asarray(lengths, "<i4"), np.asarray(document_indices, "<i8")
    sizes_S = lengths_S.astype("<i8") * dtype.itemsize
    offsets_S: npt.NDArray[np.int64] = np.cumsum(sizes_S) - sizes_S
    header = HEADER.pack(MAGIC, VERSION, CODES[dtype], len(lengths_S), len(indices))
    return header + lengths_S.tobytes() + offsets_S.tobytes() + indices.tobytes()


def regular_size(path: Path) -> int:
    """Bytes in the regular file `path`. Raises FormatError."""
    try:
        status = path.stat()
    except OSError as error:
        raise FormatError(
            f"cannot be read: {error.strerror}", where=path, hint="a token file is a pair prefix.bin, prefix.idx"
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise FormatError("this is not a regular file", where=path)
    return status.st_size


def read_header(path: Path, size: int) -> tuple[np.dtype[np.number], int, int]:
    """Token dtype, number of sequences, number of document indices; their sizes fill the file exactly."""
    with path.open("rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise FormatError("this is not a Megatron index (no MMIDIDX header)", where=path)
    _, version, code, num_sequences, num_indices = HEADER.unpack(header)
    if version != VERSION:
        raise FormatError(f"index version {version}, only {VERSION} is known", where=path)
    if code not in DTYPES:
        raise FormatError(f"dtype code {code}, known are 1 to {len(DTYPES)}", where=path)
    expected = HEADER.size + 12 * num_sequences + 8 * num_indices
    if size == expected + num_sequences and num_sequences:
        raise FormatError("this is a multimodal index (one mode per sequence)", where=path, hint="only text is read")
    if size != expected:
        raise FormatError(f"{size} bytes, but its counts say {expected}", where=path, why="truncated or damaged")
    return DTYPES[code], num_sequences, num_indices


def check_sequences(
    lengths_S: npt.NDArray[np.int32], offsets_S: npt.NDArray[np.int64], itemsize: int, bin_bytes: int, path: Path
) -> None:
    """Sequences lie one after another, from the first byte of the .bin to the last. In blocks: bounded memory."""
    position = 0
    for start in range(0, len(lengths_S), BLOCK):
        sizes = lengths_S[start : start + BLOCK].astype(np.int64) * itemsize
        ends = position + np.cumsum(sizes)
        if (sizes < 0).any():
            raise FormatError("a sequence has a negative length", where=path)
        if not np.array_equal(ends - sizes, offsets_S[start : start + BLOCK]):
            raise FormatError("the byte offsets do not follow from the lengths", where=path, why="damaged")
        position = int(ends[-1])
    if position != bin_bytes:
        raise FormatError(
            f"the index describes {position} bytes of tokens, the .bin holds {bin_bytes}",
            where=path,
            why="the two files do not belong together, or one is truncated",
        )


def check_documents(indices: npt.NDArray[np.int64], num_sequences: int, path: Path) -> None:
    """Document indices rise from 0 to the number of sequences."""
    ends_right = len(indices) > 0 and indices[0] == 0 and indices[-1] == num_sequences
    if not ends_right or any(
        (np.diff(indices[start : start + BLOCK + 1]) < 0).any() for start in range(0, len(indices), BLOCK)
    ):
        raise FormatError("the document indices do not rise from 0 to the number of sequences", where=path)
