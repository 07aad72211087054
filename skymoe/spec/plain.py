"""A ModelSpec from the plain data that a run's `state.json` keeps of it (`dataclasses.asdict`, through JSON)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter, ValidationError

from skymoe.base.errors import CheckpointError, printable
from skymoe.spec.model import ModelSpec

_SPECS = TypeAdapter(ModelSpec)


def spec_from_plain(data: Any, *, where: object = "") -> ModelSpec:
    """The inverse of `asdict`.

    Raises:
        CheckpointError: these are not the fields of a model.
        ConfigError: their values contradict each other.
    """
    try:
        spec = _SPECS.validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = printable(".".join(map(str, first["loc"])), 100)
        raise CheckpointError(f"no model: {field}: {printable(first['msg'])}", where=where) from error
    if unknown := list(_unknown(data, asdict(spec))):
        hint = "read it with the version of skymoe that wrote it"
        raise CheckpointError(f"no model: unknown field {printable(unknown[0], 100)}", where=where, hint=hint)
    return spec


def _unknown(data: Mapping[str, Any], known: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in data.items():
        if key not in known:
            yield prefix + key
        elif isinstance(value, Mapping) and isinstance(known[key], Mapping):
            yield from _unknown(value, known[key], f"{prefix}{key}.")
