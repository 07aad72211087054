"""Config: what the user asks of one job, read strictly.

A recipe is YAML (or TOML), the command line adds `key.sub=value`. Later sources win:

    defaults < extends: base.yaml < the recipe < environment SKYMOE__KEY__SUB < command line

Values are checked in the mode pydantic calls strict JSON: a list may become a tuple, text a path or an enum, a whole
number a float, and text that is a number a float ("1e-5"); nothing else is converted. An unknown key is an error, never
ignored. Every problem is told at once, with its file and line, its dotted path and the nearest valid key.
A Config is frozen: nothing edits it after it is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from skymoe.base.document import Document, Key, parse_scalar, read_document, read_plain
from skymoe.base.errors import ConfigError
from skymoe.base.problems import explain, written_key

COMMAND_LINE = "command line"
_ENVIRONMENT_PREFIX = "SKYMOE__"


class Config(BaseModel):
    """Base of every section a user writes. Docstrings under the fields become the descriptions of the schema."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def replace(self, **changes: object) -> Self:
        """A copy with other values in some fields, checked again."""
        return type(self).model_validate({**{name: getattr(self, name) for name in type(self).model_fields}, **changes})


C = TypeVar("C", bound=Config)


def read_config(
    cls: type[C], path: Path | None, overrides: Sequence[str] = (), *, defaults: Mapping[str, Any] | None = None
) -> C:
    """The config that a recipe, the environment and `key=value` overrides give together.

    Args:
        cls: which config.
        path: the recipe; None when there is none.
        overrides: `key.sub=value` from the command line; the value is read like YAML.
        defaults: plain data below everything else.

    Raises:
        ConfigError: naming every problem, where it stands, and the nearest valid key.
    """
    document = Document(dict(defaults or {}), {(): "defaults"})
    if path is not None:
        for layer in _read_layers(path):
            document = _merge(document, layer)
    for text, place in _environment():
        document = _override(document, text, place)
    for text in overrides:
        document = _override(document, text, COMMAND_LINE)
    return _validate(cls, document, str(path or COMMAND_LINE))


def check_config(
    cls: type[C], options: Mapping[str, Any], overrides: Sequence[str] = (), *, flags: bool | Mapping[str, str] = False
) -> C:
    """The config that command-line options and `key=value` give together. Neither files nor the environment take part.

    Args:
        cls: which config.
        options: by key.
        overrides: `key.sub=value`; the value is read like YAML.
        flags: the flag of every option is called as its key, so that errors can name it: `--micro-batch`; but for those
            that a mapping names.

    Raises:
        ConfigError: as `read_config`.
    """
    others = flags if isinstance(flags, Mapping) else {}
    named = options if flags is not False else ()
    places: dict[Key, str] = {(name,): others.get(name, f"--{name.replace('_', '-')}") for name in named}
    document = Document(dict(options), {(): COMMAND_LINE, **places})
    for text in overrides:
        document = _override(document, text, COMMAND_LINE)
    return _validate(cls, document, COMMAND_LINE)


def dump_config(config: Config) -> str:
    """`config` as YAML that `read_config` reads back to an equal one."""
    data = config.model_dump(mode="json")
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _read_layers(path: Path) -> list[Document]:
    """The base that `extends` names, if any, and the recipe itself. One level, so that a person can follow it."""
    recipe = read_document(path)
    base = recipe.data.pop("extends", None)
    if base is None:
        return [recipe]
    where = recipe.place(("extends",))
    if not isinstance(base, str):
        raise ConfigError("extends: expected a file name", where=where)
    layer = read_document(path.parent / base)
    if "extends" in layer.data:
        raise ConfigError("a recipe that is extended cannot itself extend another", where=layer.place(("extends",)))
    return [layer, recipe]


def _merge(below: Document, above: Document) -> Document:
    """`above` over `below`: sections merge key by key, everything else is replaced."""
    places = {key: place for key, place in below.places.items() if not _replaced(key, above.data)}
    return Document(_merge_data(below.data, above.data), {**places, **above.places})


def _merge_data(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        both_sections = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merge_data(merged[name], value) if both_sections else value
    return merged


def _replaced(key: Key, data: Any) -> bool:
    """Whether the value at `key` is hidden by another kind of value in `data`."""
    for name in key:
        if not isinstance(data, dict):
            return True
        if name not in data:
            return False
        data = data[name]
    return not isinstance(data, dict)


def _environment() -> list[tuple[str, str]]:
    """`SKYMOE__TRAIN__LR=1` as ("train.lr=1", "environment SKYMOE__TRAIN__LR")."""
    names = sorted(name for name in os.environ if name.startswith(_ENVIRONMENT_PREFIX))
    keys = [name.removeprefix(_ENVIRONMENT_PREFIX).lower().replace("__", ".") for name in names]
    return [(f"{key}={os.environ[name]}", f"environment {name}") for key, name in zip(keys, names, strict=True)]


def _override(document: Document, text: str, place: str) -> Document:
    """`document` with `key.sub=value` put in; a number in the path is a position in a list."""
    dotted, equals, raw = text.partition("=")
    parts = dotted.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"expected key=value, got {text!r}", where=place, hint="for example `steps=100`")
    value = parse_scalar(raw, f"{place}: {dotted}")
    key: Key = ()
    data: Any = _copy(document.data)
    root = data
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(data, list):
            index = int(part) if part.isdecimal() else -1
            if not 0 <= index < len(data):
                raise ConfigError(f"{dotted}: the list has items 0 to {len(data) - 1}, not {part!r}", where=place)
            step: str | int = index
        else:
            step = part
            if not last and not isinstance(data.get(part), (dict, list)):
                data[part] = {}
        key = (*key, step)
        if last:
            data[step] = value
        else:
            data = data[step]
    places = {known: where for known, where in document.places.items() if known[: len(key)] != key}
    return Document(root, {**places, key: place})


def _copy(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {name: _copy(value) for name, value in data.items()}
    return [_copy(item) for item in data] if isinstance(data, (list, tuple)) else data


def _validate(cls: type[C], document: Document, name: str) -> C:
    try:
        return cls.model_validate_json(json.dumps(document.data, default=str))
    except ValidationError as error:
        problems = error
    data = _copy(document.data)
    if any([_read_number(data, item) for item in problems.errors(include_url=False)]):
        return _validate(cls, Document(data, document.places), name)
    raise explain(problems, cls, document, name) from problems


def _read_number(data: Any, problem: ErrorDetails) -> bool:
    """Where a float is expected, make a number of text such as "1e-5": many YAML writers quote it."""
    text = problem["input"]
    if problem["type"] != "float_type" or not isinstance(text, str):
        return False
    *parents, last = written_key(data, problem["loc"])
    for step in parents:
        data = data[step]
    try:
        data[last] = float(text)
    except ValueError:
        return False
    return True


class _Dumper(yaml.SafeDumper):
    """Quotes text that a YAML 1.2 reader (ours) or a YAML 1.1 reader (PyYAML) would take for something else."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    is_plain = read_plain(text) == text and text.isprintable()  # line breaks of Unicode would be folded
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_plain else '"')


_Dumper.add_representer(str, _represent_text)
