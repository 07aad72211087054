"""The answers of a batch: a file that grows by whole lines, and that a later run goes on with.

    {"index": 4, "id": "q7", "text": "...", "token_ids": [..], "finish": "stop", "num_prompt_tokens": 12, "key": ".."}
    {"index": 9, "error": "the prompt has 9000 tokens, ..", "key": ".."}

Lines stand in the order in which they were done; `index` says which prompt they answer. Each is pushed to the disk
before the next step, so a kill or a power cut costs only what was being written. A last line that is torn is cut off
when the next run begins. `key` binds an answer to what was asked and to the model: a run that finds another key
at an index stops before any work, as the file would otherwise hold answers to two different questions. Prompts
that are added at the end of the input leave what is done as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from skymoe.base.errors import ConfigError, FormatError, MachineError
from skymoe.base.files import fsync_dir, machine_errors
from skymoe.base.log import logger
from skymoe.base.strict_json import parse_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MAX_LINE_BYTES = 1 << 30
_BEGIN = b'{"index": '  # of every line, so that a torn one is told from a file that is somebody else's
_KEY_LENGTH = 16


def key_of(model: str, digest: str) -> str:
    """What binds an answer: the model's fingerprint and the digest of what was asked."""
    return hashlib.sha256(f"{model} {digest}".encode()).hexdigest()[:_KEY_LENGTH]


class Results:
    """The output file, open for appending, nobody else's.

    Attributes:
        done: indices that are answered; `failed`: those among them that have an error.
        num_repaired: bytes of a torn line that were cut off.
    """

    def __init__(self, file: BinaryIO, path: Path, keys: Mapping[int, str]) -> None:
        self._file = file
        self.done: set[int] = set()
        self.failed: set[int] = set()
        self.num_repaired = 0
        file.seek(0)
        number = end = 0
        while data := file.readline(MAX_LINE_BYTES):
            number += 1
            if data.endswith(b"\n"):
                self._count(_read(data, f"{path}:{number}"), keys, f"{path}:{number}")
                end += len(data)
            elif data.startswith(_BEGIN) or _BEGIN.startswith(data):
                self.num_repaired = len(data)
            else:
                raise _stranger(f"{path}:{number}")
        file.truncate(end)
        file.seek(0, os.SEEK_END)

    def append(self, lines: list[dict[str, Any]]) -> None:
        """Write these lines; they are on the disk when this returns.

        Raises:
            MachineError: the system refuses.
        """
        data = b"".join(json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n" for line in lines)
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())
        for line in lines:
            self._note(line)

    def _count(self, line: dict[str, Any], keys: Mapping[int, str], where: str) -> None:
        index = line["index"]
        if keys.get(index) != line["key"] or index in self.done:
            why = (
                "this prompt is answered twice" if index in self.done
                else f"line {index} of the input, its options or the model are not those of this answer"
            )  # fmt: skip
            hint = "name another output, or --overwrite begins anew"
            raise ConfigError("the output is of another run", where=where, why=why, hint=hint)
        self._note(line)

    def _note(self, line: dict[str, Any]) -> None:
        self.done.add(line["index"])
        if "error" in line:
            self.failed.add(line["index"])


@contextmanager
def open_results(path: Path, keys: Mapping[int, str], *, overwrite: bool = False) -> Iterator[Results]:
    """The output at `path`, made if need be.

    Args:
        path: where.
        keys: of every prompt, by index.
        overwrite: forget what is there.

    Raises:
        ConfigError, FormatError: what is there are no answers to these prompts.
        MachineError: another run writes it, or the system refuses.
    """
    with machine_errors(path):
        is_new = not path.exists()
        if not is_new and not path.is_file():
            raise ConfigError("the output is not a regular file", where=path)
        with path.open("a+b") as file:
            _lock(file, path)
            if overwrite:
                file.truncate(0)
            results = Results(file, path, keys)
            if is_new:
                fsync_dir(path.parent)
            yield results


def _read(data: bytes, where: str) -> dict[str, Any]:
    line = parse_json(data, where=where)
    if not isinstance(line, dict) or type(line.get("index")) is not int or not isinstance(line.get("key"), str):
        raise _stranger(where)
    return line


def _stranger(where: str) -> FormatError:
    hint = "name another output, or --overwrite begins anew"
    return FormatError("this is no answer of skymoe generate", where=where, hint=hint)


def _lock(file: BinaryIO, path: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise MachineError("another run is writing this file", where=path, hint="wait for it, or stop it") from error
    except OSError as error:  # some network file systems have no locks
        logger.debug("no lock on %s: %s", path, error.strerror)
