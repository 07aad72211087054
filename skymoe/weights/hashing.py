"""Writing files and hashing them at the same time: the memory is hashed, not what the disk gives back. No torch."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import NamedTuple, Self

from skymoe.weights.header import Header, TensorInfo, plan_file, write_all
from skymoe.weights.manifest import FileRecord, TensorRecord
from skymoe.weights.slices import Box
from skymoe.weights.stored import whole_box

MAX_LAG_BYTES = 2**28  # of a hash behind the write


class Place(NamedTuple):
    """Where a tensor of a file belongs in a whole one."""

    box: Box
    whole_shape: tuple[int, ...]


class PlannedFile:
    """A safetensors file whose header is known before the first byte is written.

    Args:
        tensors: name to dtype and shape.
        places: of the tensors that are pieces of others; one that is not named is whole.
        metadata: free strings of the header.

    Raises:
        FormatError: a name that cannot be stored.
    """

    def __init__(
        self, tensors: Mapping[str, TensorInfo], places: Mapping[str, Place], metadata: Mapping[str, str]
    ) -> None:
        self._prefix, self.header = plan_file(tensors, metadata)
        self._places = places

    def write(
        self, path: Path, parts: Callable[[str], Iterable[memoryview]], *, max_lag_bytes: int = MAX_LAG_BYTES
    ) -> FileRecord:
        """Write the file and push it to the disk. Writing and the two hashes, of file and tensor, run side by side.

        Args:
            path: a new file.
            parts: the bytes of a tensor by its name, in order; asked for in the order of the header.
            max_lag_bytes: a part must stay as it is while the hashes lag behind; 0 when `parts` uses one buffer again.
        """
        whole, digests = hashlib.sha256(self._prefix), {name: hashlib.sha256() for name in self.header.tensors}
        with FileIO(path, "xb") as file, _Lane(max_lag_bytes) as whole_lane, _Lane(max_lag_bytes) as tensor_lane:
            write_all(file, self._prefix)
            for name, digest in digests.items():
                for data in parts(name):
                    whole_lane.submit(whole.update, data)
                    tensor_lane.submit(digest.update, data)
                    write_all(file, data)
                    whole_lane.catch_up()
                    tensor_lane.catch_up()
            os.fsync(file.fileno())
        hexadecimal = {name: digest.hexdigest() for name, digest in digests.items()}
        tensors = _records(self.header, hexadecimal, self._places)
        return FileRecord(bytes=self.header.num_bytes, sha256=whole.hexdigest(), tensors=tensors)


class _Lane:
    """One thread that hashes what it is given, in order. It lags by a bounded number of bytes, which stay in memory."""

    def __init__(self, max_lag_bytes: int) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._waiting: deque[tuple[Future[None], int]] = deque()
        self._lag, self._max_lag = 0, max_lag_bytes

    def submit(self, update: Callable[[memoryview], None], data: memoryview) -> None:
        self._waiting.append((self._pool.submit(update, data), len(data)))
        self._lag += len(data)

    def catch_up(self) -> None:
        """Wait until the lag is within its bound, or a single part."""
        may_wait = 1 if self._max_lag else 0
        while self._lag > self._max_lag and len(self._waiting) > may_wait:
            task, size = self._waiting.popleft()
            task.result()
            self._lag -= size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown()
        for task, _ in self._waiting:
            task.result()


def write_texts(directory: Path, texts: Mapping[str, bytes]) -> dict[str, FileRecord]:
    """Write small files under their names, each pushed to the disk; what the manifest says of them."""
    records = {}
    for name, text in texts.items():
        records[name] = FileRecord(bytes=len(text), sha256=hashlib.sha256(text).hexdigest())
        write_synced(directory / name, text)
    return records


def write_synced(path: Path, text: bytes) -> None:
    """A new small file, pushed to the disk."""
    with FileIO(path, "xb") as file:
        write_all(file, text)
        os.fsync(file.fileno())


def _records(header: Header, digests: Mapping[str, str], places: Mapping[str, Place]) -> dict[str, TensorRecord]:
    return {
        name: TensorRecord(
            dtype=info.dtype,
            shape=info.shape,
            slice=places[name].box if name in places else whole_box(info.shape),
            offset=header.offsets[name],
            sha256=digests[name],
            whole=places[name].whole_shape if name in places else None,
        )
        for name, info in header.tensors.items()
    }
