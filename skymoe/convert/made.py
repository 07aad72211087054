"""How a model came to be, as data: what skymoe.json holds and the model card tells.

Everything that is needed to make the model again, and to know surely from what it was made: command, method, options,
seed, and the SHA-256 of every file of every parent. No clock, no host name, no absolute path.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skymoe import __version__
from skymoe.base.errors import printable
from skymoe.base.inside import inside, read_bounded
from skymoe.convert.identity import FileHashes
from skymoe.convert.licence import Licence, find_licence
from skymoe.convert.parents import Parent
from skymoe.spec.flops import count_parameters
from skymoe.spec.hf import CONFIG_NAME, MAX_CONFIG_BYTES, read_config, unread_fields
from skymoe.spec.model import Architecture


@dataclass(frozen=True)
class ParentRecord:
    """What is written down of one parent.

    Attributes:
        name: its hub id where it lies in the Hugging Face cache, else the name of its directory.
        architecture, parameters: what it is.
        sha256: file name to hash, of config.json and every weight file.
        unread: fields of its config.json that say nothing the new config could hold.
        licence: what it says of its licence.
    """

    name: str
    architecture: Architecture
    parameters: int
    sha256: Mapping[str, str]
    unread: Mapping[str, Any]
    licence: Licence


@dataclass(frozen=True)
class Made:
    """How a model came to be.

    Attributes:
        command: of skymoe: "upcycle", "export", "quantize".
        method: in a word or two: "copy", "to mixtral", "fp8 block".
        parents: what it was made from, the base first.
        summary: what was done, in a sentence or two, for the model card.
        options: JSON data, all that is needed to do it again; no paths.
        seed: of all random values; None when there are none.
        remarks: what a user should know.
        new_routers: the routers are random, so that the model wants training.
    """

    command: str
    method: str
    parents: tuple[ParentRecord, ...]
    summary: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    remarks: tuple[str, ...] = ()
    new_routers: bool = False


def record_parent(parent: Parent, hashes: Mapping[str, str] | None = None) -> ParentRecord:
    """What to remember of `parent`.

    Args:
        parent: open.
        hashes: file name to SHA-256 of its weights, as `FileHashes.result` gives for each parent; None computes them.

    Raises:
        FormatError: a file is missing, hostile or cannot be read.
    """
    if hashes is None:
        with FileHashes([parent.directory]) as background:
            (hashes,) = background.result()
    config = read_bounded(inside(parent.directory, CONFIG_NAME), max_bytes=MAX_CONFIG_BYTES)
    return ParentRecord(
        name=model_name(parent.directory),
        architecture=parent.spec.architecture,
        parameters=count_parameters(parent.spec).total,
        sha256={CONFIG_NAME: hashlib.sha256(config).hexdigest(), **hashes},
        unread=unread_fields(read_config(parent.directory)),
        licence=find_licence(parent.directory, parent.spec.architecture),
    )


def provenance(made: Made) -> dict[str, Any]:
    """The content of skymoe.json."""
    return {
        "skymoe": __version__,
        "made_by": made.command,
        "method": made.method,
        "seed": made.seed,
        "options": dict(made.options),
        "parents": [
            {
                "name": printable(parent.name, 200),
                "architecture": parent.architecture.value,
                "parameters": parent.parameters,
                "sha256": dict(parent.sha256),
                "config_fields_left_behind": dict(parent.unread),
            }
            for parent in made.parents
        ],
        "remarks": list(made.remarks),
    }


def model_name(directory: Path) -> str:
    """`org/name` of a directory in the Hugging Face cache (`models--org--name/snapshots/...`), else its own name."""
    home = directory.resolve()
    repository = home.parent.parent.name
    if home.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/", 1)
    return home.name or "model"
