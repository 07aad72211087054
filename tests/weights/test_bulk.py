"""Writes past the page cache: the same bytes as ordinary ones, whatever the offsets, the order and the file system."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

from skymoe.weights import bulk
from skymoe.weights.bulk import BLOCK, BUFFER_BYTES, BulkFile, Disk

SIZES = [3, 2**20 + 1, BUFFER_BYTES, 2 * BUFFER_BYTES + 12_345, 2**20 - 1, BLOCK, 2**20, 3 * 2**20 - 7]


def written(path: Path, seed: int) -> tuple[bytes, bytes]:
    """What the file holds and what it should: pieces of `SIZES` at ragged offsets, some never, some several times."""
    draw = random.Random(seed)
    pieces, places, end = [draw.randbytes(size) for size in SIZES], [[] for _ in SIZES], 0
    for number in draw.choices(range(len(SIZES)), k=12):
        places[number].append(end)
        end += SIZES[number]
    disk = Disk()
    file = BulkFile(path, disk)
    for number in draw.sample(range(len(SIZES)), len(SIZES)):
        own = bytearray(pieces[number])
        file.write(memoryview(own), places[number])
        own[:] = bytes(len(own))  # the caller may reuse its memory
    disk.wait()
    file.sync()
    disk.close()
    file.close()
    file.close()
    where = sorted((offset, number) for number, offsets in enumerate(places) for offset in offsets)
    return path.read_bytes(), b"".join(pieces[number] for _, number in where)


def assert_same(path: Path, seed: int) -> None:
    found, expected = written(path, seed)
    same = found == expected  # compared here: pytest would print the difference of megabytes
    assert same


@pytest.mark.parametrize("seed", range(4))
def test_any_order_and_alignment(tmp_path: Path, seed: int) -> None:
    assert_same(tmp_path / "file", seed)


def test_file_systems_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused when the file is opened, refused at the write, taken in part: all end with the same bytes."""
    pwrite, calls = os.pwrite, []

    def partly(descriptor: int, data: memoryview, offset: int) -> int:
        calls.append(len(data))
        if len(calls) % 3 == 1:
            return pwrite(descriptor, data[: (len(data) + 1) // 2], offset)
        if len(calls) % 3 == 2 and len(data) % BLOCK == 0 and offset % BLOCK == 0:
            raise OSError(errno.EINVAL, "Invalid argument")
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(bulk, "_O_DIRECT", 0)
    assert_same(tmp_path / "a", 0)

    def write_all(descriptor: int, data: memoryview, offset: int) -> None:
        """Never refused. By offset, as the thread and the test write through one descriptor."""
        while data:
            count = pwrite(descriptor, data, offset)
            data, offset = data[count:], offset + count

    monkeypatch.setattr(bulk, "_open_direct", lambda path: os.open(path, os.O_WRONLY))
    monkeypatch.setattr(bulk, "_write_all", write_all)
    monkeypatch.setattr(os, "pwrite", partly)
    assert_same(tmp_path / "b", 1)
    assert len(calls) > 3


def test_the_failure_of_a_large_write_rises_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk()
    file = BulkFile(tmp_path / "file", disk)

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        file.write(memoryview(bytes(2 * BUFFER_BYTES)), [0])
        disk.wait()
    disk.close()
    file.close()


def test_an_existing_file_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("theirs")
    with pytest.raises(FileExistsError):
        BulkFile(tmp_path / "file", Disk())
    assert (tmp_path / "file").read_text() == "theirs"
