"""What a parent says of its licence: in its model card, and in the files beside the weights.

Nothing is decided here: what is said is carried on. Where nothing is said, the card of the new model says that.
Weights derived from Skywork's stay under the Skywork Community License, whoever passes them on; Skywork's names alone
do not tell, since `skymoe export --format skywork` gives them to any model: its own card says where that came from.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skymoe.base.document import parse_yaml
from skymoe.base.errors import SkymoeError
from skymoe.base.inside import read_inside
from skymoe.spec.model import Architecture
from skymoe.weights.companions import PROVENANCE_NAME, licence_names

_MAX_CARD_BYTES = 4 * 2**20
_MAX_FRONT = 64 * 2**10
_FRONT = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_ID = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+()-]{0,100}")
_LINK = re.compile(r"https://[A-Za-z0-9][A-Za-z0-9./_%~+-]{0,300}")
_SKYWORK = (Architecture.SKYWORK, Architecture.SKYWORK_MOE)


@dataclass(frozen=True)
class Licence:
    """What is known of a licence; empty where nothing is.

    Attributes:
        identifier: as the hub writes it: "apache-2.0", "llama3.1", "other".
        name, link: what goes with "other".
        files: names of the licence files.
        is_skywork: the Skywork Community License applies.
    """

    identifier: str = ""
    name: str = ""
    link: str = ""
    files: tuple[str, ...] = ()
    is_skywork: bool = False


def find_licence(directory: Path, architecture: Architecture) -> Licence:
    """What the model in `directory` says. Raises FormatError only when the licence files themselves are hostile."""
    files, said = licence_names(directory), card_metadata(directory)
    is_released = architecture in _SKYWORK and not (directory / PROVENANCE_NAME).is_file()  # not one that we wrote
    is_skywork = is_released or "skywork" in said.get("license_name", "").lower()
    identifier, name, link = (said.get(key, "") for key in ("license", "license_name", "license_link"))
    if is_skywork and not identifier:
        identifier, name = "other", "skywork-community-license"
    if files and not identifier:
        identifier = "other"
    return Licence(identifier, name, link, files, is_skywork)


def card_metadata(directory: Path) -> dict[str, str]:
    """`license`, `license_name` and `license_link` out of README.md, each only if it looks like one; else nothing."""
    try:
        content = read_inside(directory, "README.md", max_bytes=_MAX_CARD_BYTES)
        front = _FRONT.match((content or b"")[:_MAX_FRONT].decode("utf-8", errors="replace"))
        said = parse_yaml(front[1], "README.md").data if front else {}
    except SkymoeError:  # a card that cannot be read says nothing
        return {}
    forms = {"license": _ID, "license_name": _NAME, "license_link": _LINK}
    found = {key: _one(said.get(key)) for key in forms}
    return {key: value for key, value in found.items() if value and forms[key].fullmatch(value)}


def _one(value: Any) -> str:
    """Some cards list several licences; the first stands for all."""
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, str) else ""
