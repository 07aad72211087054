"""Files of a directory that comes from strangers: links may not lead out of it, sizes are bounded.

A model directory with `tokenizer.json -> /etc/passwd` would otherwise have that file copied into what we publish. The
one link that is followed is that of the Hugging Face cache: `snapshots/<revision>/` points to the `blobs/` beside it.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from skymoe.base.errors import FormatError, printable


def inside(directory: Path, name: str) -> Path:
    """The file `name` of `directory`, its links resolved.

    Raises:
        FormatError: there is none, or a link leads out of the directory.
    """
    path = directory / name
    try:
        home, target = directory.resolve(strict=True), path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # missing, or links in a circle
        raise FormatError("the file is missing", where=path, hint="download the model again, completely") from error
    in_cache = home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs"
    if target.parent != home and not in_cache:
        why = f"it points to {printable(target)}"
        raise FormatError("a link that leads out of the model directory", where=path, why=why)
    return target


def read_inside(directory: Path, name: str, *, max_bytes: int) -> bytes | None:
    """The content of file `name` of `directory`; None when there is no such name.

    Raises:
        FormatError: a link that leads out or nowhere, no regular file, or more than `max_bytes`.
    """
    if not os.path.lexists(directory / name):
        return None
    return read_bounded(inside(directory, name), max_bytes=max_bytes)


def read_bounded(path: Path, *, max_bytes: int) -> bytes:
    """The content of the regular file `path`, which has at most `max_bytes`. Raises FormatError."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a FIFO or a device would never end
            raise FormatError("this is not a regular file", where=path)
        with path.open("rb") as file:
            data = b"" if found.st_size > max_bytes else file.read(max_bytes + 1)
    except FileNotFoundError as error:
        raise FormatError("there is no such file", where=path) from error
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", where=path) from error
    if max(found.st_size, len(data)) > max_bytes:
        raise FormatError(f"the file is larger than {max_bytes} bytes", where=path, why="no honest file of its kind is")
    return data
