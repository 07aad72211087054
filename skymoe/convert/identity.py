"""Which files a conversion starts from: quickly, to know whether it may be continued; and surely, for the record.

Sizes and times of the files tell within a millisecond whether a parent is still the one that an interrupted run read.
Their SHA-256 tells anyone, later, which model it was; that takes a pass over every byte, so `FileHashes` makes it in a
thread beside the conversion, which waits for the disk most of the time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any, Self

from skymoe import __version__
from skymoe.base.errors import FormatError
from skymoe.convert.parents import Parent
from skymoe.convert.plan import ConversionPlan
from skymoe.spec.hf import CONFIG_NAME
from skymoe.weights.header import CHUNK_BYTES
from skymoe.weights.index import weight_paths


def conversion_fingerprint(plan: ConversionPlan, parents: Sequence[Parent], options: Mapping[str, Any]) -> str:
    """A hash of everything that decides what a conversion writes, for `base.files.resumable_directory`.

    Args:
        plan: what will be done.
        parents: of what; their weight files and config.json count by name, size and time of change.
        options: JSON data: seed, shard size and whatever else of the config the plan does not say. No paths.
    """
    files = [_stamps(parent.directory) for parent in parents]
    data = {"skymoe": __version__, "plan": plan.fingerprint(), "parents": files, "options": dict(options)}
    return hashlib.sha256(json.dumps(data, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _stamps(directory: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of the files that decide the weights."""
    paths = {**weight_paths(directory), CONFIG_NAME: directory / CONFIG_NAME}
    states = {name: os.stat(path) for name, path in paths.items()}
    return [(name, state.st_size, state.st_mtime_ns) for name, state in states.items()]


class FileHashes:
    """SHA-256 of the weight files of model directories, computed in the background. A context manager.

        with FileHashes([parent.directory for parent in parents]) as hashes:
            replay(...)
            record = hashes.result()  # waits for what is left

    Leaving the block early gives up.

    Raises:
        FormatError: a directory has no weights.
    """

    def __init__(self, directories: Iterable[Path]) -> None:
        self._stop = Event()
        found = [weight_paths(directory) for directory in directories]
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hash")
        self._futures: list[dict[str, Future[str]]] = [
            {name: self._pool.submit(_sha256, path, self._stop) for name, path in paths.items()} for paths in found
        ]

    def result(self) -> tuple[dict[str, str], ...]:
        """For each directory: file name to SHA-256 in hexadecimal.

        Raises:
            FormatError: a file cannot be read.
        """
        return tuple({name: future.result() for name, future in futures.items()} for futures in self._futures)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)


def _sha256(path: Path, stop: Event) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
    try:
        with path.open("rb", buffering=0) as file:
            while not stop.is_set() and (count := file.readinto(buffer)):
                digest.update(buffer[:count])
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", where=path) from error
    return digest.hexdigest()
