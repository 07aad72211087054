"""What every command that writes a model reports, and what its dry run does. No torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from skymoe.base.space import lack_of_space
from skymoe.convert.plan import ConversionPlan


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


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A dry run: what would be written, and whether there is room for it.

    Attributes:
        plan: every tensor.
        disk_free: bytes free where it would go; None when no place is named.
    """

    plan: ConversionPlan
    disk_free: int | None

    @property
    def disk_bytes(self) -> int:
        """What the weights take. A run that goes on where another one stopped needs less."""
        return self.plan.bytes_written

    @property
    def lack_of_space(self) -> str:
        """What the run would say of the disk; empty when there is room, or no place is named."""
        return "" if self.disk_free is None else lack_of_space(self.disk_bytes, self.disk_free)

    def as_json(self) -> dict[str, Any]:
        """All of it as plain data, the tensors last."""
        data = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "plan"}
        return data | {"disk_bytes": self.disk_bytes, "lack_of_space": self.lack_of_space} | self.plan.as_json()


def written(out: Path, seconds: float) -> Written:
    """What lies in `out` now."""
    found = sorted(path for path in out.rglob("*") if path.is_file())
    names = tuple(path.relative_to(out).as_posix() for path in found)
    return Written(out, names, sum(path.stat().st_size for path in found), round(seconds, 3))
