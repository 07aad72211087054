"""Writing files and hashing them at the same time: the memory is hashed, not what the disk gives back."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Self

from torch import Tensor

from skymoe.weights.buffers import bytes_of, info_of
from skymoe.weights.header import Header, plan_file, write_all
from skymoe.weights.manifest import FileRecord, TensorRecord

_MAX_LAG_BYTES = 2**28  # of a hash behind the write


class TensorsToSave:
    """The tensors of one safetensors file, and its header, which is known before the first byte is written.

    Raises:
        FormatError: a tensor of a type or name that cannot be stored.
    """

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        infos = {name: info_of(name, tensor) for name, tensor in tensors.items()}
        self.tensors = tensors
        self.prefix, self.header = plan_file(infos, metadata)

    def write(self, path: Path) -> FileRecord:
        """Write the file and push it to the disk. Writing and the two hashes, of file and tensor, run side by side."""
        whole, digests = hashlib.sha256(self.prefix), {name: hashlib.sha256() for name in self.header.tensors}
        with FileIO(path, "xb") as file, _Lane() as whole_lane, _Lane() as tensor_lane:
            write_all(file, self.prefix)
            for name, digest in digests.items():
                data = bytes_of(self.tensors[name])
                whole_lane.submit(whole.update, data)
                tensor_lane.submit(digest.update, data)
                write_all(file, data)
            os.fsync(file.fileno())
        hexadecimal = {name: digest.hexdigest() for name, digest in digests.items()}
        return FileRecord(
            bytes=self.header.num_bytes, sha256=whole.hexdigest(), tensors=_records(self.header, hexadecimal)
        )


class _Lane:
    """One thread that hashes what it is given, in order. It lags by a bounded number of bytes, which stay in memory."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._waiting: deque[tuple[Future[None], int]] = deque()
        self._lag = 0

    def submit(self, update: Callable[[memoryview], None], data: memoryview) -> None:
        self._waiting.append((self._pool.submit(update, data), len(data)))
        self._lag += len(data)
        while self._lag > _MAX_LAG_BYTES and len(self._waiting) > 1:
            task, size = self._waiting.popleft()
            task.result()
            self._lag -= size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown()
        for task, _ in self._waiting:
            task.result()


def write_files(
    directory: Path, files: Mapping[str, TensorsToSave], texts: Mapping[str, bytes]
) -> dict[str, FileRecord]:
    """Write tensor files and texts under their names, each pushed to the disk; what the manifest says of them."""
    records = {name: file.write(directory / name) for name, file in files.items()}
    for name, text in texts.items():
        records[name] = FileRecord(bytes=len(text), sha256=hashlib.sha256(text).hexdigest())
        write_synced(directory / name, text)
    return records


def write_synced(path: Path, text: bytes) -> None:
    """A new small file, pushed to the disk."""
    with FileIO(path, "xb") as file:
        write_all(file, text)
        os.fsync(file.fileno())


def _records(header: Header, digests: Mapping[str, str]) -> dict[str, TensorRecord]:
    return {
        name: TensorRecord(
            dtype=info.dtype,
            shape=info.shape,
            slice=tuple((0, size) for size in info.shape),
            offset=header.offsets[name],
            sha256=digests[name],
        )
        for name, info in header.tensors.items()
    }
