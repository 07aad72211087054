"""What the builders of hostile model directories share: the form of a case, and ways to damage a valid directory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
SECRET = b"correct horse battery staple"  # in files outside the model; it must never reach an output
VICTIM = "victim"  # a directory beside the model: another model, and a secret

Build = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """One hostile directory.

    Attributes:
        make: damages a copy of the base in place.
        base: which valid model it starts from, see `hostile_models.BASES`.
        refused: which jobs must refuse it. "all"; "model": all that take it for a model (a comparison by names need
            not); "values": those that read every weight, too (`inspect` need not); "copying": those that pass documents
            on, the others must work; "none": it is harmless, all must work; "maybe": either, and no harm is done.
        says: every one of these must be in the message, the file above all.
    """

    make: Build
    base: str = "dense"
    refused: str = "all"
    says: tuple[str, ...] = ()


def container(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with this header (an object or raw bytes), whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a valid file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def edit_header(change: Callable[[dict[str, Any]], object]) -> Build:
    """Change the header of model.safetensors: in place, or by returning another header (an object or bytes)."""

    def make(directory: Path) -> None:
        header, data = split(directory / WEIGHTS)
        changed = change(header)
        (directory / WEIGHTS).write_bytes(container(header if changed is None else changed, data))

    return make


def edit_entry(change: Callable[[dict[str, Any]], object], name: str = "model.norm.weight") -> Build:
    """Change the header's entry of one tensor in place."""
    return edit_header(lambda header: (change(header[name]), None)[1])


def edit_json(file: str, change: Callable[[Any], object]) -> Build:
    """Change a JSON document: in place, or by returning another."""

    def make(directory: Path) -> None:
        document = json.loads((directory / file).read_text())
        changed = change(document)
        (directory / file).write_text(json.dumps(document if changed is None else changed))

    return make


def set_field(name: str, raw: str) -> Build:
    """Set a (dotted) field of config.json to raw JSON text, which need not be valid."""

    def make(directory: Path) -> None:
        config = json.loads((directory / CONFIG).read_text())
        target = config
        *parents, last = name.split(".")
        for key in parents:
            target = target.setdefault(key, {})
        target[last] = "@@"
        (directory / CONFIG).write_text(json.dumps(config).replace('"@@"', raw))

    return make


def write(file: str, content: bytes) -> Build:
    """Replace a file by these bytes."""
    return lambda directory: _put(directory / file, lambda path: path.write_bytes(content))


def sparse(file: str, size: int, head: bytes = b"") -> Build:
    """Replace a file by `size` zeros that take no room on the disk, after `head`."""

    def put(path: Path) -> None:
        path.write_bytes(head)
        os.truncate(path, size)

    return lambda directory: _put(directory / file, put)


def link(file: str, target: str) -> Build:
    """Replace a file by a symbolic link."""
    return lambda directory: _put(directory / file, lambda path: path.symlink_to(target))


def fifo(file: str) -> Build:
    """Replace a file by a FIFO that nobody writes to."""
    return lambda directory: _put(directory / file, os.mkfifo)


def folder(file: str) -> Build:
    """Replace a file by a directory."""
    return lambda directory: _put(directory / file, lambda path: path.mkdir())


def both(*builds: Build) -> Build:
    """One after another."""

    def make(directory: Path) -> None:
        for build in builds:
            build(directory)

    return make


def _put(path: Path, put: Callable[[Path], object]) -> None:
    path.unlink(missing_ok=True)
    put(path)
