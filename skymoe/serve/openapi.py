"""The OpenAPI document: true, so that a fuzzer can hold the server to it (`tests/serve/test_serve_schema.py`).

Every status that can come back is named, with its form. Bodies are described by the models that read them. Tokens are
bounded by the vocabulary of the model that is served, which is known once it is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from skymoe.serve.protocol.common import TOKEN_ID, ErrorAnswer

_REF = "#/components/schemas/{model}"
_SCHEME = "key"
_ALL = {
    400: "The request is not HTTP/1.1, or says two lengths of its body.",
    401: "The API key is missing or wrong.",
    405: "The route has another method.",
    408: "The request did not arrive in time.",
    413: "The body is too large.",
    421: "Without an API key: the Host header names another server.",
    431: "The headers are too large.",
    500: "A defect of the server, or of the model at this request.",
    501: "The body comes in another transfer coding than chunked.",
    503: "The server loads, drains, or has too many connections.",
}
_BODY = {
    400: "The request cannot be read, or asks for what cannot be.",
    404: "There is no such model.",
    415: "The body is no JSON.",
    429: "Too much is under way; Retry-After says when to come again.",
}
_EVENT = {
    "type": "object",
    "description": "An event of the stream: `data` is JSON, or `[DONE]`, the last.",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}
_STREAM = {"text/event-stream": {"schema": _EVENT}}


def posts(
    answer: type[BaseModel], request: type[BaseModel], examples: dict[str, Any], *, streams: bool = False
) -> dict[str, Any]:
    """What FastAPI is to know of a route that takes a body."""
    schema = {"$ref": _REF.format(model=request.__name__)}
    shown = {name: {"value": value} for name, value in examples.items()}
    content = {"application/json": {"schema": schema, "examples": shown}}
    ok: dict[str, Any] = {"model": answer, "description": "The answer."}
    if streams:
        ok["content"] = dict(_STREAM)
    return {
        "responses": {200: ok} | _errors({**_ALL, **_BODY}),
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
        "response_model": None,
    }


def gets(answer: type[BaseModel] | None, *, more: dict[int, str] | None = None, media: str = "") -> dict[str, Any]:
    """What FastAPI is to know of a route without a body."""
    ok: dict[str, Any] = {"description": "The answer."}
    if answer is not None:
        ok["model"] = answer
    else:
        ok["content"] = {media: {"schema": {"type": "string"}}}
    return {"responses": {200: ok} | _errors({**_ALL, **(more or {})}), "response_model": None}


def _errors(texts: dict[int, str]) -> dict[int, dict[str, Any]]:
    return {status: {"model": ErrorAnswer, "description": text} for status, text in sorted(texts.items())}


def document(
    app: FastAPI, requests: Sequence[type[BaseModel]], *, vocab_size: int | None, models: Sequence[str], with_key: bool
) -> dict[str, Any]:
    """The document.

    Args:
        app: whose routes.
        requests: the models of bodies that the routes refer to.
        vocab_size: bound of tokens; None while it is not known.
        models: names that requests may have in `model`.
        with_key: whether the API key is asked for.
    """
    made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    _, definitions = models_json_schema([(model, "validation") for model in requests], ref_template=_REF)
    schemas = made.setdefault("components", {}).setdefault("schemas", {})
    schemas.update(definitions["$defs"])
    for name in (model.__name__ for model in requests):
        _name_models(schemas[name], models)
    _bound_tokens(schemas, vocab_size or 2**31)
    if with_key:
        made["components"]["securitySchemes"] = {_SCHEME: {"type": "http", "scheme": "bearer"}}
        made["security"] = [{_SCHEME: []}]
    return made


def _name_models(schema: dict[str, Any], models: Sequence[str]) -> None:
    if "model" in schema.get("properties", {}):
        schema["properties"]["model"] = {"anyOf": [{"type": "string", "enum": list(models)}, {"type": "null"}]}


def _bound_tokens(node: Any, vocab_size: int) -> None:
    """Put the vocabulary in as the bound of every number and every key that is a token."""
    if isinstance(node, list):
        for item in node:
            _bound_tokens(item, vocab_size)
    elif isinstance(node, dict):
        if node.get("format") == TOKEN_ID:
            del node["format"]
            if node["type"] == "integer":
                node["maximum"] = vocab_size - 1
            else:
                node["pattern"] = f"^({below(vocab_size)})$"
        for item in node.values():
            _bound_tokens(item, vocab_size)


def below(bound: int) -> str:
    """A regular expression of the whole numbers from 0 to `bound` - 1, without leading zeros."""
    digits = str(bound - 1)
    length = len(digits)
    parts = ["0"]
    if length > 1:  # shorter numbers
        parts.append("[1-9]" + (f"[0-9]{{0,{length - 2}}}" if length > 2 else ""))
    for i, digit in enumerate(digits):  # as long, and smaller from digit i on
        least = 1 if i == 0 else 0
        if int(digit) > least:
            rest = length - i - 1
            parts.append(f"{digits[:i]}[{least}-{int(digit) - 1}]" + (f"[0-9]{{{rest}}}" if rest else ""))
    parts.append(digits)
    return "|".join(dict.fromkeys(parts))
