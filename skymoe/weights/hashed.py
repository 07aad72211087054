"""Writing files and hashing them at the same time: the memory is hashed, not what the disk gives back."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path

from torch import Tensor

from skymoe.weights.buffers import bytes_of, info_of
from skymoe.weights.header import Header, plan_file, write_all
from skymoe.weights.manifest import FileRecord, TensorRecord

_INLINE_BYTES = 2**18  # below this, handing over to a thread costs more than the hash


class TensorsToSave:
    """The tensors of one safetensors file, and its header, which is known before the first byte is written.

    Raises:
        FormatError: a tensor of a type or name that cannot be stored.
    """

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        infos = {name: info_of(name, tensor) for name, tensor in tensors.items()}
        self.tensors = tensors
        self.prefix, self.header = plan_file(infos, metadata)

    def write(self, path: Path, pool: ThreadPoolExecutor) -> FileRecord:
        """Write the file and push it to the disk. Writing and the two hashes, of file and tensor, run side by side."""
        whole, digests = hashlib.sha256(self.prefix), {}
        with FileIO(path, "xb") as file:
            write_all(file, self.prefix)
            for name in self.header.tensors:
                data, own = bytes_of(self.tensors[name]), hashlib.sha256()
                if len(data) < _INLINE_BYTES:
                    whole.update(data)
                    own.update(data)
                    write_all(file, data)
                else:
                    tasks = [pool.submit(whole.update, data), pool.submit(own.update, data)]
                    write_all(file, data)
                    for task in tasks:
                        task.result()
                digests[name] = own.hexdigest()
            os.fsync(file.fileno())
        return FileRecord(bytes=self.header.num_bytes, sha256=whole.hexdigest(), tensors=_records(self.header, digests))


def write_files(
    directory: Path, files: Mapping[str, TensorsToSave], texts: Mapping[str, bytes]
) -> dict[str, FileRecord]:
    """Write tensor files and texts under their names, each pushed to the disk; what the manifest says of them."""
    with ThreadPoolExecutor(2) as pool:
        records = {name: file.write(directory / name, pool) for name, file in files.items()}
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
