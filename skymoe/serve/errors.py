"""What went wrong with a request, as OpenAI says it: a status and `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import functools
import http
from collections.abc import Iterator, Mapping
from typing import NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from skymoe.base.errors import SkymoeError, printable
from skymoe.serve.protocol.common import ErrorAnswer, ErrorDetail, Message

BODY = "skymoe.body"
"""the key of the ASGI scope under which the body of a request lies"""

_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 405: "invalid_request_error",
    408: "timeout_error", 413: "invalid_request_error", 415: "invalid_request_error", 421: "invalid_request_error",
    429: "rate_limit_error", 431: "invalid_request_error", 501: "invalid_request_error",
    503: "service_unavailable_error",
}  # fmt: skip


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: the HTTP status.
        message: for people; control characters are escaped.
        param: the field it is about.
        code: for programs.
        headers: more of the answer, such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.body = error_body(status, message, param=param, code=code)

    def response(self) -> Response:
        """The answer."""
        return Response(self.body, self.status, self.headers, "application/json")


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> bytes:
    """OpenAI's error object as JSON; nothing in it can break a terminal or a log."""
    detail = ErrorDetail(
        message="\n".join(printable(line, 1000) for line in message.split("\n")),
        type=_TYPES.get(status, "server_error"),
        param=None if param is None else printable(param, 100),
        code=code,
    )
    return ErrorAnswer(error=detail).model_dump_json().encode()


def raw_answer(status: int, message: str, headers: Mapping[str, str], *, code: str | None = None) -> bytes:
    """A whole HTTP/1.1 answer, for where no application has been asked; it ends the connection."""
    body = error_body(status, message, code=code)
    lines = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close", **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n{head}\r\n".encode() + body


def too_long(tokens: int, context: int) -> ApiError:
    """The prompt fills the context."""
    message = f"the prompt has {tokens} tokens; with one to write, the context of {context} is full"
    return ApiError(400, message, param="prompt", code="context_length_exceeded")


M = TypeVar("M", bound=BaseModel)


def refuse(error: SkymoeError, *, param: str | None = None, code: str | None = None) -> NoReturn:
    """A user's error, raised by what the server calls, is the client's: 400.

    Where it happened (a file of the server's) is nothing for clients to know.
    """
    lines = (error.what, error.why and f"  why: {error.why}", error.hint and f"  try: {error.hint}")
    raise ApiError(400, "\n".join(filter(None, lines)), param=param, code=code) from error


def read_body(cls: type[M], body: bytes) -> M:
    """The request in `body`, read strictly; raises ApiError 400 and names the field."""
    try:
        return cls.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
    first = min(problems, key=lambda problem: len(problem["loc"]))  # of several readings, the plainest complaint
    names = _field_names()
    field = ".".join(str(step) for step in first["loc"] if isinstance(step, int) or step in names)
    message = str(first["msg"])
    raise ApiError(400, f"{field}: {message}" if field else message, param=field or None, code="invalid_request")


@functools.cache
def _field_names() -> frozenset[str]:
    """Of all requests: places that pydantic names have the branches of unions among them."""
    return frozenset(name for cls in _below(Message) for name in cls.model_fields)


def _below(cls: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _below(child)


def read_json_body(cls: type[M], request: Request) -> M:
    """The body of `request` (`limits.py` has put it into the scope), which must say that it is JSON.

    A browser sends any text to any host without asking, but not as application/json.

    Raises:
        ApiError: 415, 400.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the body must be JSON, with `Content-Type: application/json`", code="not_json")
    return read_body(cls, request.scope[BODY])


async def answer_api_error(request: Request, error: Exception) -> Response:
    """Starlette's door for ApiError."""
    assert isinstance(error, ApiError)
    return error.response()


async def answer_http_error(request: Request, error: Exception) -> Response:
    """Starlette's door for its own: no such route, no such method."""
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, str(error.detail), headers=error.headers).response()


async def answer_defect(request: Request, error: Exception) -> Response:
    """Starlette's door for all others; what went wrong stands in the log alone."""
    return ApiError(500, "a defect of the server; its log says more", code="defect").response()
