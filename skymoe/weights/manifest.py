"""The two small files that make a checkpoint trustworthy: `MANIFEST.json` in each generation, `LATEST` beside them.

    checkpoints/
        LATEST                    which generation was published last, and the SHA-256 of its manifest
        step-00000120/
            MANIFEST.json         what every other file here must be: size, SHA-256; every tensor: dtype, shape, SHA-256
            model.safetensors  optimizer.safetensors  state.json

Where many ranks save together, each writes its own files, `model-00003.safetensors`, and a tensor in them is a box of a
whole one. Such a manifest says version 2, so that an older reader refuses it by that; what one process writes is still
version 1, byte for byte.

A *generation* is written once and never changed. Each has a `serial`, one more than that of the generation published
before it, which it names as `parent`: serials, not steps, say which is newer, because a run that was rolled back saves
step 120 again after step 140. `run` is drawn with the first generation and inherited; a directory of another run that
was copied here is told apart by it.

Both files end in a digest of their own text (with zeros in its place), so a flipped bit in them is noticed as well.
The digests guard against accidents, not against someone who rewrites them. No torch here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer

from skymoe.base.dtype import DType
from skymoe.base.errors import CheckpointError, printable

MANIFEST_NAME = "MANIFEST.json"
LATEST_NAME = "LATEST"
_MAX_BYTES = 2**28  # a quarter of a gigabyte: about a million tensors
_RANK_FILE = re.compile(r"(.+)-\d{5,}")
_NUMBER = re.compile(r"#\d+\Z")
_ZEROS = "0" * 64
_TAIL = re.compile(rb',\n "digest": "([0-9a-f]{64})"\n}\n')
_TAIL_BYTES = len(f',\n "digest": "{_ZEROS}"\n}}\n')

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_-]*\.(safetensors|json)$", max_length=200)]
_Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class TensorRecord(_Record):
    """One tensor of a file.

    Attributes:
        dtype, shape: of the bytes in this file.
        slice: [start, stop) per dimension within the whole tensor, of which this file may hold a part.
        offset: first byte within the file.
        sha256: of its bytes.
        whole: shape of the whole tensor; None means that this is all of it.
    """

    dtype: DType
    shape: tuple[_Count, ...]
    slice: tuple[tuple[_Count, _Count], ...]
    offset: _Count
    sha256: Sha256
    whole: tuple[_Count, ...] | None = None

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        if self.whole is None:
            del fields["whole"]  # as files of version 1 have it
        return fields


class FileRecord(_Record):
    """One file of a generation; `tensors` is empty for a JSON document."""

    bytes: _Count
    sha256: Sha256
    tensors: dict[str, TensorRecord] = {}


class Parent(_Record):
    """The generation published before this one."""

    step: _Count
    serial: _Count
    manifest_sha256: Sha256


class Manifest(_Record):
    """Everything a generation must be."""

    format: Literal["skymoe-generation"] = "skymoe-generation"
    version: Literal[1, 2] = 1
    step: _Count
    serial: _Count
    run: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    parent: Parent | None
    created: str
    created_by: str
    torch: str
    layout: dict[str, Any]
    files: dict[FileName, FileRecord]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files, without the manifest."""
        return sum(file.bytes for file in self.files.values())

    @property
    def num_tensors(self) -> int:
        """Whole tensors, however many pieces each is in."""
        return len({
            (stem_of(name, file), whole_name(tensor, record))
            for name, file in self.files.items()
            for tensor, record in file.tensors.items()
        })  # fmt: skip


class Latest(_Record):
    """What `LATEST` says."""

    format: Literal["skymoe-latest"] = "skymoe-latest"
    version: Literal[1] = 1
    generation: Annotated[str, Field(pattern=r"^step-[0-9]{8,19}$")]
    step: _Count
    serial: _Count
    run: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    manifest_sha256: Sha256


_RecordT = TypeVar("_RecordT", Manifest, Latest)


def file_name(stem: str, rank: int | None) -> str:
    """The tensor file of a rank; None for a process that writes everything."""
    return f"{stem}.safetensors" if rank is None else f"{stem}-{rank:05d}.safetensors"


def stem_of(file: str, record: FileRecord) -> str:
    """The inverse of `file_name`: "model" of `model-00003.safetensors`, if that is the file of a rank."""
    base = file.removesuffix(".safetensors")
    match = _RANK_FILE.fullmatch(base)
    of_a_rank = match and record.tensors and all(tensor.whole is not None for tensor in record.tensors.values())
    return match[1] if match and of_a_rank else base


def numbered(name: str, count: int) -> str:
    """What the `count`-th piece of tensor `name` is called in its file, from 1."""
    assert not _NUMBER.search(name), f"{name} cannot be told from a numbered piece"
    return name if count == 1 else f"{name}#{count}"


def whole_name(name: str, record: TensorRecord) -> str:
    """The inverse of `numbered`."""
    return name if record.whole is None else _NUMBER.sub("", name)


def generation_name(step: int) -> str:
    """The directory name of the generation of `step`."""
    return f"step-{step:08d}"


def sealed(record: Manifest | Latest) -> bytes:
    """The text of `record`, its own digest at the end; compact where many ranks fill it with their pieces."""
    return seal(record.model_dump(mode="json"), indent=None if record.version == 2 else 1)


def seal(content: Mapping[str, Any], *, indent: int | None = 1) -> bytes:
    """`content` as JSON text that ends in the digest of itself."""
    body = json.dumps(content, indent=indent).removesuffix("}").removesuffix("\n")
    text = f'{body},\n "digest": "{_ZEROS}"\n}}\n'
    digest = hashlib.sha256(text.encode()).hexdigest()
    return (text[: -len(_ZEROS) - 4] + digest + text[-4:]).encode()


def read_manifest(directory: Path) -> tuple[Manifest, str]:
    """The manifest of a generation and the SHA-256 of its text.

    Raises:
        CheckpointError: missing, damaged, not ours, or of a newer format.
    """
    return _read(directory / MANIFEST_NAME, Manifest)


def read_latest(root: Path) -> Latest | None:
    """What `LATEST` in `root` says, None when there is none. Raises CheckpointError when it is damaged."""
    return _read(root / LATEST_NAME, Latest)[0] if os.path.lexists(root / LATEST_NAME) else None


def _read(path: Path, kind: type[_RecordT]) -> tuple[_RecordT, str]:
    try:
        if not path.is_file():
            raise CheckpointError("the file is missing", where=path)
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=path) from error
    try:
        return kind.model_validate_json(_unseal(raw, path)), hashlib.sha256(raw).hexdigest()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = printable(".".join(map(str, first["loc"])), 100)
        hint = "read it with the version of skymoe that wrote it" if field == "version" else ""
        raise CheckpointError(f"field {field!r}: {printable(first['msg'])}", where=path, hint=hint) from error


def _unseal(raw: bytes, path: Path) -> bytes:
    """The text without its digest, once that is proven."""
    tail = _TAIL.fullmatch(raw[-_TAIL_BYTES:])
    if len(raw) > _MAX_BYTES or not tail:
        raise CheckpointError("damaged: the file does not end in its digest", where=path)
    zeroed = raw[: -_TAIL_BYTES + tail.start(1)] + _ZEROS.encode() + raw[-4:]
    if hashlib.sha256(zeroed).hexdigest().encode() != tail[1]:
        raise CheckpointError("damaged: its text does not match its own digest", where=path)
    return raw[:-_TAIL_BYTES] + b"\n}\n"
