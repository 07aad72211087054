"""torch's process-wide switches for the time of a run, and the lock on the run directory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from skymoe.base.errors import ConfigError, MachineError
from skymoe.base.files import machine_errors
from skymoe.base.memory import keep_freed_memory
from skymoe.ops.device import usable_device
from skymoe.train.config import TrainConfig


@contextmanager
def torch_settings(config: TrainConfig) -> Iterator[torch.device]:
    """Threads and deterministic kernels inside the block; yields the device.

    Deterministic mode would also fill every new tensor with NaN to expose reads of uninitialised memory: a debugging
    aid that costs a pass over memory, so it is off here.
    """
    device = _device(config.run.device)
    if device.type == "cpu":
        keep_freed_memory()
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    switches: Any = torch.utils.deterministic  # its attributes are made by a module subclass that mypy cannot see
    fill = switches.fill_uninitialized_memory
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS is not deterministic
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(config.run.deterministic)
    switches.fill_uninitialized_memory = False
    try:
        yield device
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        switches.fill_uninitialized_memory = fill


@contextmanager
def run_directory(directory: Path) -> Iterator[None]:
    """Create the run directory and hold it: a second process on it is refused (not on Windows). It dies with us."""
    lock = directory / ".lock"
    with machine_errors(directory):
        is_new = not directory.exists()
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MachineError(
                "another process is training in this directory", where=directory, hint="choose another run.dir"
            ) from error
        yield
    except BaseException:
        if is_new and [path.name for path in directory.iterdir()] == [lock.name]:  # refused before anything was written
            lock.unlink()
            directory.rmdir()
        raise
    finally:
        os.close(descriptor)


def _device(name: str) -> torch.device:
    device = usable_device(name, where="run.device")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"training runs on cpu and cuda, not on {device.type}", where="run.device")
    return device
