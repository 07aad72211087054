r"""The prompts of a batch: one JSON object per line, read strictly.

    {"prompt": "Once upon a time"}
    {"prompt": [1, 523, 77], "max_tokens": 20, "temperature": 0}
    {"id": "q7", "messages": [{"role": "user", "content": "Hello"}], "stop": ["\n"]}

`prompt` is text or token ids, `messages` a conversation for the chat template of the model; one of the two. `id` is
copied to the answer. Every field of `SamplingParams` may stand beside them and holds for this line (`stop` also as one
text); what is absent is that of the command line. Empty lines are skipped and have no number.

The whole file is read and checked before the model is loaded, so a mistake in line 90,000 is told after a second and
not after a night. What only the model can say (a prompt that is longer than the context) ends the line it concerns.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from skymoe.base.errors import FormatError, SkymoeError, printable
from skymoe.base.files import machine_errors
from skymoe.base.strict_json import parse_json
from skymoe.engine.params import SamplingParams
from skymoe.generate.config import BatchConfig

MAX_LINE_BYTES = 16 << 20
_MAX_TOLD = 5
_DEFAULTS = ("max_tokens", "temperature", "top_k", "top_p", "ignore_eos")
_PARAMETERS = {field.name for field in dataclasses.fields(SamplingParams)}
_PARAMS: TypeAdapter[SamplingParams] = TypeAdapter(SamplingParams)

_Token = Annotated[int, Field(ge=0, lt=2**31)]


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    role: Literal["system", "user", "assistant"]
    content: str


class _Line(BaseModel):
    """What a line says beside the parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    id: str | None = Field(default=None, max_length=500)
    prompt: str | tuple[_Token, ...] | None = None
    messages: tuple[_Message, ...] | None = Field(default=None, min_length=1, max_length=1000)


@dataclass(frozen=True)
class Task:
    """One line of the input.

    Attributes:
        index: from 0, empty lines not counted; `line`: from 1, as an editor counts.
        id: what the line calls itself, if it does.
        prompt: text or token ids; None with `messages`.
        messages: a conversation.
        params: with what is absent filled in.
        digest: of what the line asks.
    """

    index: int
    line: int
    id: str | None
    prompt: str | tuple[int, ...] | None
    messages: tuple[dict[str, str], ...] | None
    params: SamplingParams
    digest: str


def read_tasks(config: BatchConfig) -> Iterator[Task]:
    """The tasks of `config.input`, in order.

    Raises:
        FormatError: naming the line.
    """
    index = 0
    for number, data in _lines(config.input):
        if data.strip():
            yield _task(config, index, number, data)
            index += 1


def check_tasks(config: BatchConfig) -> dict[int, str]:
    """Read all of the input; the digest of each task by its index.

    Raises:
        FormatError: naming the first lines that cannot be used, each with its reason.
    """
    digests: dict[int, str] = {}
    errors: list[SkymoeError] = []
    for number, data in _lines(config.input):
        if not data.strip():
            continue
        index = len(digests) + len(errors)
        try:
            digests[index] = _task(config, index, number, data).digest
        except SkymoeError as error:
            errors.append(error)
    if errors:
        told = "\n".join(
            f"{printable(e.where)}: {e.what}" + (f" ({e.why})" if e.why else "") for e in errors[:_MAX_TOLD]
        )
        more = f"\nand {len(errors) - _MAX_TOLD} more" if len(errors) > _MAX_TOLD else ""
        raise FormatError(f"{len(errors)} of {index + 1} prompts cannot be used; nothing is done\n{told}{more}")
    if not digests:
        raise FormatError("there is no prompt", where=config.input)
    return digests


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, each bounded."""
    if not path.is_file():
        raise FormatError("there is no such file" if not path.exists() else "this is not a regular file", where=path)
    with machine_errors(path), path.open("rb") as file:
        number = 0
        while data := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(data) > MAX_LINE_BYTES:
                raise FormatError(f"a line of more than {MAX_LINE_BYTES} bytes", where=f"{path}:{number}")
            yield number, data


def _task(config: BatchConfig, index: int, number: int, data: bytes) -> Task:
    where = f"{config.input}:{number}"
    content = parse_json(data, where=where)
    if not isinstance(content, dict):
        raise FormatError(f"expected a JSON object, found {type(content).__name__}", where=where)
    given = {name: value for name, value in content.items() if name in _PARAMETERS}
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    line = _checked(_Line, {name: value for name, value in content.items() if name not in _PARAMETERS}, where)
    if (line.prompt is None) == (line.messages is None):
        raise FormatError('a line has either "prompt" or "messages"', where=where)
    if line.prompt == ():
        raise FormatError("prompt: no token to continue from", where=where)
    defaults: dict[str, object] = {name: getattr(config, name) for name in _DEFAULTS}
    params = _params({**defaults, "seed": config.seed + index, **given}, where)
    messages = None if line.messages is None else tuple(message.model_dump() for message in line.messages)
    asked = repr((line.id, line.prompt, messages, _plain(params)))
    digest = hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()
    return Task(index, number, line.id, line.prompt, messages, params, digest)


def _checked(cls: type[_Line], content: Mapping[str, Any], where: str) -> _Line:
    unknown = [name for name in content if name not in cls.model_fields]
    if unknown:
        known = ", ".join((*cls.model_fields, *sorted(_PARAMETERS)))
        raise FormatError(f"unknown key {printable(unknown[0], 60)!r}", where=where, hint=f"known: {known}")
    try:
        return cls.model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise _explained(error, where) from error


def _params(content: Mapping[str, Any], where: str) -> SamplingParams:
    try:
        return _PARAMS.validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise _explained(error, where) from error


def _explained(error: ValidationError, where: str) -> FormatError:
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(step) for step in first["loc"])
    told = first["msg"].removeprefix("Value error, ")
    return FormatError(f"{printable(place, 60)}: {told}" if place else told, where=where)


def _plain(params: SamplingParams) -> tuple[object, ...]:
    """All fields, as values that print alike when they are alike."""
    values = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
    return tuple({**values, "logit_bias": tuple(sorted(params.logit_bias.items()))}.items())
