"""What every command that writes a model reports. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Written:
    """A model directory that was written.

    Attributes:
        out: the directory.
        files: names of everything in it.
        bytes_written: of all files.
        seconds: from the beginning of the command to the published directory.
    """

    out: Path
    files: tuple[str, ...]
    bytes_written: int
    seconds: float


def written(out: Path, seconds: float) -> Written:
    """What lies in `out` now."""
    found = sorted(path for path in out.rglob("*") if path.is_file())
    names = tuple(path.relative_to(out).as_posix() for path in found)
    return Written(out, names, sum(path.stat().st_size for path in found), round(seconds, 3))
