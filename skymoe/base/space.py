"""Room on the disk: asked for before the work, not found missing after an hour of it."""

from __future__ import annotations

import shutil
from pathlib import Path

from skymoe.base.errors import MachineError


def ensure_free_space(directory: Path, num_bytes: int) -> None:
    """Refuse early when `directory` (which need not exist yet) cannot take `num_bytes` more.

    Raises:
        MachineError: naming what is needed and what is free.
    """
    if lack := lack_of_space(num_bytes, free_space(directory)):
        raise MachineError(lack, where=directory, hint="free some space or choose another directory")


def free_space(directory: Path) -> int:
    """Bytes that `directory` (which need not exist yet) can take."""
    existing = directory.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def lack_of_space(num_bytes: int, free: int) -> str:
    """What to say when `num_bytes` are needed and `free` are there; empty when they are enough."""
    enough = num_bytes <= free
    return "" if enough else f"not enough space: {num_bytes / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free"
