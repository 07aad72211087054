"""A disk that is soon full: a file system in memory, mounted for the time of a test. Needs root."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def file_system_of(path: Path, size: str) -> Iterator[Path]:
    """A new directory `path` that holds `size` ("2m") and no more; skips the test where it cannot be made."""
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("mounting needs root")
    path.mkdir()
    done = subprocess.run([mount, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no mount: {done.stderr.decode()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)
