"""ShardedWriter: a model's tensors into safetensors shards, streamed one at a time.

A safetensors header comes before the data and states every byte range. The plan (names, dtypes, shapes) is therefore
given first; headers and shards follow from it, and each tensor is written at its place when it comes, in any order.
Memory is bounded by the tensor at hand. The bytes depend on the plan and the tensors only, not on the order of arrival.
At the end the writer proves that nothing is missing.

A shard is `NAME.part` until all its tensors are on the disk (fsync), and only then `NAME`. So whatever kills the
process, a file under its name is whole, and a later writer of the same plan may keep it (`resume`). The bytes go past
the page cache where the system allows it (`bulk.py`).
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path
from types import MappingProxyType
from typing import Self

from torch import Tensor

from skymoe.base.dtype import DType
from skymoe.base.errors import FormatError, printable
from skymoe.base.files import PART_SUFFIX, fsync_dir, machine_errors, write_atomic
from skymoe.base.space import ensure_free_space
from skymoe.weights.buffers import bytes_of, info_of
from skymoe.weights.bulk import BulkFile, Disk
from skymoe.weights.header import Header, TensorInfo, plan_file
from skymoe.weights.index import INDEX_NAME, SINGLE_NAME

DEFAULT_SHARD_BYTES = 5_000_000_000
_METADATA = MappingProxyType({"format": "pt"})  # transformers refuses files without it


class ShardedWriter:
    """Writes the tensors of `plan` into `directory`, which must exist. A context manager that calls `finish`.

    One shard is `model.safetensors`; several are `model-00001-of-00003.safetensors` and so on, with an index. A tensor
    larger than `max_shard_bytes` has a shard to itself.

    Args:
        directory: an existing directory, best a `staging_directory` or a `resumable_directory`.
        plan: (name, dtype, shape) of every tensor, in the order of the shards.
        max_shard_bytes: most bytes of tensor data in one file.
        metadata: free strings of each header.
        resume: keep the shards that an earlier writer of this plan finished here; their tensors are `done`.

    Attributes:
        done: names of the tensors that need not come, because their shard was finished before.

    Raises:
        ConfigError: a shard is there already, and `resume` is not given.
        FormatError: a name that is unsafe or comes twice, a plan without tensors.
        MachineError: the disk is too small, or a write fails.
    """

    def __init__(
        self,
        directory: Path,
        plan: Sequence[tuple[str, DType, Sequence[int]]],
        *,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        metadata: Mapping[str, str] = _METADATA,
        resume: bool = False,
    ) -> None:
        self._directory = directory
        shards = _cut(_check_plan(plan), max_shard_bytes)
        self._total_bytes = sum(info.num_bytes for shard in shards for info in shard.values())
        paths = [directory / name for name in _shard_names(len(shards))]
        self._shards = [_Shard(path, *plan_file(shard, metadata)) for path, shard in zip(paths, shards, strict=True)]
        self._shard_of = {name: shard for shard in self._shards for name in shard.header.tensors}
        self._disk = Disk()
        with machine_errors(directory):
            finished = [shard for shard in self._shards if shard.begin(resume)]
        self.done = frozenset(name for shard in finished for name in shard.header.tensors)
        there = sum(shard.header.num_bytes for shard in finished)
        ensure_free_space(directory, sum(shard.header.num_bytes for shard in self._shards) - there)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write `tensor` at its place.

        Raises:
            FormatError: not in the plan, already there, or another dtype or shape than planned.
            MachineError: the write fails.
        """
        self.add_copies([name], tensor)

    def add_copies(self, names: Sequence[str], tensor: Tensor) -> None:
        """Write `tensor` under each of `names`, which costs little more work than under one. Raises as `add`."""
        by_shard: dict[int, list[str]] = {}
        for name in names:
            self._check(name, tensor)
            by_shard.setdefault(id(self._shard_of[name]), []).append(name)
        data = bytes_of(tensor)
        for some in by_shard.values():
            self._shard_of[some[0]].write(some, data, self._disk)

    def _check(self, name: str, tensor: Tensor) -> None:
        if name not in self._shard_of:
            raise FormatError(f"tensor {printable(name)} is not in the plan", where=self._directory)
        shard, info = self._shard_of[name], info_of(name, tensor)
        if name not in shard.missing:
            raise FormatError(f"tensor {name} was written before", where=shard.path)
        if info != shard.header.tensors[name]:
            planned = shard.header.tensors[name]
            why = f"planned {planned.dtype} {list(planned.shape)}, got {info.dtype} {list(info.shape)}"
            raise FormatError(f"tensor {name} is not as planned", where=shard.path, why=why)

    def finish(self) -> tuple[Path, ...]:
        """Write the index, and return the weight files: everything is on the disk.

        Raises:
            FormatError: tensors of the plan never came; they are named.
        """
        missing = [name for shard in self._shards for name in shard.header.tensors if name in shard.missing]
        if missing:
            self.abort()
            named = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise FormatError(f"{len(missing)} planned tensors were never written: {named}", where=self._directory)
        with machine_errors(self._directory):
            try:
                self._disk.wait()
            finally:
                self.abort()
        if len(self._shards) > 1:
            weight_map = {name: shard.path.name for name, shard in self._shard_of.items()}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            write_atomic(self._directory / INDEX_NAME, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())
        with machine_errors(self._directory):
            fsync_dir(self._directory)
        return tuple(shard.path for shard in self._shards)

    def abort(self) -> None:
        """Close the files as they are; for a caller that gives up. Harmless twice."""
        self._disk.close()
        for shard in self._shards:
            shard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        if kind is None:
            self.finish()
        else:
            self.abort()


class _Shard:
    """One file being written; opened at its first tensor, pushed to the disk, closed and named at its last."""

    def __init__(self, path: Path, prefix: bytes, header: Header) -> None:
        self.path, self.header = path, header
        self.missing = set(header.tensors)
        self._part = path.with_name(path.name + PART_SUFFIX)
        self._prefix = prefix
        self._file: BulkFile | None = None

    def begin(self, resume: bool) -> bool:
        """Look at what is there; whether it is this shard, finished. What is not is removed."""
        if not resume and (self.path.exists() or self._part.exists()):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self.path))
        self._part.unlink(missing_ok=True)
        if not self.path.is_file():
            return False
        with FileIO(self.path, "rb") as file:
            same = file.read(len(self._prefix)) == self._prefix
        if not same or self.path.stat().st_size != self.header.num_bytes:
            self.path.unlink()
            return False
        self.missing.clear()
        return True

    def write(self, names: Sequence[str], data: memoryview, disk: Disk) -> None:
        """Put `data` at the places of `names`; the last tensor of a shard makes `disk` finish the file."""
        with machine_errors(self.path):
            if self._file is None:
                self._file = BulkFile(self._part, disk)
                self._file.write(memoryview(self._prefix), [0])
            self._file.write(data, [self.header.offsets[name] for name in names])
            self.missing.difference_update(names)
            if not self.missing:
                disk.start(self._finish, self._file)

    def _finish(self, file: BulkFile) -> None:
        file.sync()
        file.close()
        os.rename(self._part, self.path)

    def close(self) -> None:
        """Close the file as it is."""
        if self._file is not None:
            self._file.close()


def _check_plan(plan: Sequence[tuple[str, DType, Sequence[int]]]) -> dict[str, TensorInfo]:
    tensors = {}
    for name, dtype, shape in plan:
        if name in tensors:
            raise FormatError(f"tensor {name} is planned twice")
        tensors[name] = TensorInfo(dtype, tuple(shape))
    if not tensors:
        raise FormatError("a model without tensors cannot be written")
    return tensors


def _cut(tensors: Mapping[str, TensorInfo], max_bytes: int) -> list[dict[str, TensorInfo]]:
    """Consecutive tensors into shards of at most `max_bytes` (or one tensor)."""
    shards: list[dict[str, TensorInfo]] = [{}]
    room = max_bytes
    for name, info in tensors.items():
        if shards[-1] and info.num_bytes > room:
            shards.append({})
            room = max_bytes
        shards[-1][name] = info
        room -= info.num_bytes
    return shards


def _shard_names(count: int) -> list[str]:
    return [SINGLE_NAME] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
