"""Reading YAML and TOML as plain data that remembers the line of every key.

PyYAML is asked for the node graph only, and the scalars are read by the YAML 1.2 core rules, because the rules it has
for YAML 1.1 surprise people: `1e-5` would be text, `on` and `no` truth values, `12:30` the number 750, `010` eight.
Also refused: duplicate keys (YAML keeps the last one silently), tags, merge keys, and files that expand without bound.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from skymoe.base.errors import ConfigError, printable

_MAX_BYTES = 1_000_000
_MAX_NODES = 100_000
_MAX_DEPTH = 100

Key = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """A mapping as it was written, and where each of its values stands.

    Attributes:
        data: dicts, lists, strings, numbers, truth values and None.
        places: path of a value -> "recipe.yaml:7" or "command line".
    """

    data: dict[str, Any]
    places: dict[Key, str] = field(default_factory=dict)

    def place(self, key: Key) -> str:
        """Where `key` stands, or the nearest thing around it; empty when nothing is known."""
        while key and key not in self.places:
            key = key[:-1]
        return self.places.get(key, "")


def read_document(path: Path) -> Document:
    """The mapping in the file at `path`; TOML by its suffix, YAML otherwise.

    Raises:
        ConfigError: no such file, not text, not a mapping, duplicate keys, tags, or too large.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"a recipe of more than {_MAX_BYTES} bytes", where=path)
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the recipe: {error.strerror}", where=path) from error
    except UnicodeDecodeError as error:
        raise ConfigError("the recipe is not UTF-8 text", where=path) from error
    return _parse_toml(text, str(path)) if path.suffix.lower() == ".toml" else parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> Document:
    """The mapping in a YAML text; an empty text is an empty mapping. Raises ConfigError."""
    reader = _NodeReader(name)
    data = reader.read(_compose(text, name))
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError("expected `key: value` lines", where=name)
    return Document(data, {(): name, **reader.places})


def parse_scalar(text: str, name: str) -> Any:
    """The value in `key=value`: a number, truth value, `[1, 2]`, `{a: 1}`, or text. Raises ConfigError."""
    return _NodeReader(name).read(_compose(text, name))


def _compose(text: str, name: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{name}:{mark.line + 1}" if mark and "\n" in text else name
        raise ConfigError(f"not valid YAML: {error.problem}", where=where) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError("not valid YAML", where=name, why=printable(error)) from error


class _Loader(yaml.SafeLoader):
    """Takes every scalar for text; `read_plain` decides."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


_INT = re.compile(r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NULL = {"", "~", "null", "Null", "NULL"}


def read_plain(text: str) -> Any:
    """What unquoted `text` means in YAML 1.2 (core schema); `_` may stand between digits."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text) and len(text) <= 100:
        digits = text.replace("_", "")
        return int(digits, 16 if digits.startswith("0x") else 8 if digits.startswith("0o") else 10)
    if _FLOAT.fullmatch(text):
        return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


class _NodeReader:
    """Turns one node graph into plain data, noting the line of every key."""

    def __init__(self, name: str) -> None:
        self.name, self.places = name, dict[Key, str]()
        self._num_nodes = 0

    def read(self, node: yaml.Node | None, key: Key = ()) -> Any:
        """The data below `node`, which stands at `key`."""
        if node is None:
            return None
        where = f"{self.name}:{node.start_mark.line + 1}"
        self._num_nodes += 1
        if self._num_nodes > _MAX_NODES or len(key) > _MAX_DEPTH:
            raise ConfigError("the recipe is too large or too deep", where=where, why="its aliases may expand forever")
        self.places.setdefault(key, where)
        if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:str":
            # A plain scalar has no style; a quoted one is text whatever it looks like.
            return node.value if node.style else read_plain(node.value)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self.read(item, (*key, i)) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return self._read_mapping(node, key)
        raise ConfigError(f"the YAML tag {printable(node.tag)} is not allowed", where=where)

    def _read_mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for name_node, value_node in node.value:
            where = f"{self.name}:{name_node.start_mark.line + 1}"
            if not isinstance(name_node, yaml.ScalarNode) or not isinstance(name_node.value, str):
                raise ConfigError("a key must be a word", where=where)
            name = name_node.value
            if name == "<<":
                raise ConfigError("merge keys (`<<`) are not supported", where=where, hint="use `extends: base.yaml`")
            if name in data:
                first = self.places[(*key, name)]
                raise ConfigError(f"the key {printable(name)!r} is given twice", where=where, why=f"first at {first}")
            self.places[(*key, name)] = where
            data[name] = self.read(value_node, (*key, name))
        return data


def _parse_toml(text: str, name: str) -> Document:
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError("not valid TOML", where=name, why=printable(error)) from error
    return Document(data, {(): name, **_toml_lines(text, name)})


def _toml_lines(text: str, name: str) -> dict[Key, str]:
    """Line of each bare key. tomllib does not tell, so this is a scan: headers, then `key =` at the start of a line."""
    places: dict[Key, str] = {}
    section: Key = ()
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.fullmatch(r"\s*\[\s*([\w.\s-]+?)\s*\]\s*(#.*)?", line):
            section = tuple(part.strip() for part in header[1].split("."))
            places.setdefault(section, f"{name}:{number}")
        elif pair := re.match(r"\s*([\w.-]+)\s*=", line):
            places.setdefault((*section, *pair[1].split(".")), f"{name}:{number}")
    return places
