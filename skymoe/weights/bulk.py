"""Large writes past the page cache, made by a thread. No torch.

An ordinary write copies into the page cache: the kernel finds a page for every 4 KB, and writes it out when it sees
fit. For a model of many gigabytes that is most of the CPU time of a conversion, it throws everything else out of the
cache, and the end waits for what is still pending. With `O_DIRECT` the disk takes the bytes from our memory
(docs/performance.md has the figures). Offset, size and address must then be multiples of the block size, so a piece is
copied into one of two aligned buffers, once for all copies of a tensor: one buffer is filled while the other is
written. The ragged ends of a tensor, small tensors, and file systems without `O_DIRECT` (memory, some networks, other
systems than Linux) go the ordinary way.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

BLOCK = 4096  # covers the block size of every disk we know
BUFFER_BYTES = 8 * 2**20
_SMALL = 2**20  # bytes below which the page cache is the better place
_O_DIRECT = os.O_DIRECT if sys.platform == "linux" else 0


class Disk:
    """A thread that waits for the disk. One action at a time: who starts the next waits for the last, and its error."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="disk")
        self._last: Future[None] | None = None
        self._buffers: list[memoryview] = []

    def start(self, action: Callable[..., None], *arguments: object) -> None:
        """Do `action(*arguments)` soon."""
        self.wait()
        self._last = self._pool.submit(action, *arguments)

    def wait(self) -> None:
        """Until the last action is done; its error rises here."""
        if self._last is not None:
            last, self._last = self._last, None
            last.result()

    def buffer(self) -> memoryview:
        """Memory aligned to a page that no action reads: the one last given out belongs to the action last started."""
        if not self._buffers:
            self._buffers = [memoryview(mmap.mmap(-1, BUFFER_BYTES)) for _ in range(2)]
        self._buffers.reverse()
        return self._buffers[0]

    def close(self) -> None:
        """End the thread; an error that nobody waited for is lost. Harmless twice."""
        self._pool.shutdown()


class BulkFile:
    """A new file, written at any place in any order; the large pieces are written by `disk`.

    Raises:
        OSError: the file exists, or a write fails; the failure of a large piece rises at a later call.
    """

    def __init__(self, path: Path, disk: Disk) -> None:
        self._disk = disk
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._direct = _open_direct(path)
        self._is_open = True

    def write(self, data: memoryview, offsets: Sequence[int]) -> None:
        """Put `data` at each of `offsets`; it may be reused at once."""
        if self._direct is None or len(data) < _SMALL:
            for offset in offsets:
                _write_all(self._file, data, offset)
            return
        for phase in {offset % BLOCK for offset in offsets}:  # one, if the tensors before are whole blocks
            self._write_in_phase(data, [offset for offset in offsets if offset % BLOCK == phase])

    def _write_in_phase(self, data: memoryview, offsets: Sequence[int]) -> None:
        """Offsets that have the same remainder, so that one aligned buffer serves them all."""
        begin = -offsets[0] % BLOCK
        end = begin + (len(data) - begin) // BLOCK * BLOCK
        for start in range(begin, end, BUFFER_BYTES):
            size = min(BUFFER_BYTES, end - start)
            buffer = self._disk.buffer()
            buffer[:size] = data[start : start + size]
            self._disk.start(self._write_direct, buffer[:size], [offset + start for offset in offsets])
        for offset in offsets:
            _write_all(self._file, data[:begin], offset)
            _write_all(self._file, data[end:], offset + end)

    def _write_direct(self, data: memoryview, offsets: Sequence[int]) -> None:
        assert self._direct is not None
        for offset in offsets:
            try:
                done = os.pwrite(self._direct, data, offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                done = 0  # this file system wants another alignment
            _write_all(self._file, data[done:], offset + done)

    def sync(self) -> None:
        """Until everything is on the disk. For an action of `disk` itself, so that it comes after the others."""
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file as it is; harmless twice. Nothing of it may be under way."""
        if self._is_open:
            self._is_open = False
            os.close(self._file)
            if self._direct is not None:
                os.close(self._direct)


def _open_direct(path: Path) -> int | None:
    if not _O_DIRECT:
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC | _O_DIRECT)
    except OSError:  # the file system has none
        return None


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """All of `data` at `offset`; one `pwrite` may take less than it is given."""
    while data:
        count = os.pwrite(descriptor, data[:BUFFER_BYTES], offset)
        data, offset = data[count:], offset + count
