"""metrics.jsonl: the record of a run, one JSON object per line, and the source of truth for reports and trackers.

Lines carry `kind` (run, train, eval, event) and, except the first, `step`. The file only grows, with one exception:
when a run goes back to step s, by resuming or by rollback, lines of later steps are dropped, so no step is told
twice. Lines are pushed to the disk before each checkpoint generation is published: what a generation has seen is
not missing here.

A full disk does not stop training: lines wait in memory until there is room again.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from skymoe.base.files import machine_errors, write_atomic
from skymoe.base.log import logger

SCHEMA = 1


class MetricsLog:
    """An open metrics file. Use `flush` before a checkpoint and `close` at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = b""
        self._descriptor = self._open()

    def write(self, line: dict[str, Any]) -> None:
        """Append one line. NaN and infinities become null, which every JSON reader takes."""
        self._waiting += _encode(finite(line))
        self._drain()

    def flush(self) -> None:
        """Push all lines to the disk."""
        self._drain(sync=True)

    def truncate_after(self, step: int) -> None:
        """Drop lines of steps above `step`, and a torn last line."""
        self._drain()
        os.close(self._descriptor)
        kept = [line for line in read_metrics(self.path) if line.get("step", 0) <= step]
        write_atomic(self.path, b"".join(map(_encode, kept)))
        self._descriptor = self._open()

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        os.close(self._descriptor)

    def _open(self) -> int:
        with machine_errors(self.path):
            return os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def _drain(self, *, sync: bool = False) -> None:
        """Write what waits, whole or not at all."""
        size = os.fstat(self._descriptor).st_size
        try:
            rest = memoryview(self._waiting)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            self._waiting = b""
            if sync:
                os.fsync(self._descriptor)
        except OSError as error:
            if self._waiting:
                os.ftruncate(self._descriptor, size)
            logger.warning("%s: cannot write metrics, they wait in memory: %s", self.path, error)


class NoMetrics(MetricsLog):
    """What ranks other than the first have: they know the same figures, and write none."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, line: dict[str, Any]) -> None:
        pass

    def flush(self) -> None:
        pass

    def truncate_after(self, step: int) -> None:
        pass

    def close(self) -> None:
        pass


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a line cut by a crash can only be the last one and is left out."""
    if not path.exists():
        return []
    parsed = map(_parse, path.read_text(encoding="utf-8", errors="replace").splitlines())
    return [line for line in parsed if line is not None]


def finite(value: Any) -> Any:
    """Plain data with NaN and infinities replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def _encode(line: dict[str, Any]) -> bytes:
    return json.dumps(line, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _parse(line: str) -> dict[str, Any] | None:
    try:
        parsed = json.loads(line)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None
