"""ASGI middleware: how long a body may be, how much of all bodies may lie in memory, and that it is JSON.

A length that is announced is judged before a byte is read; chunks are counted as they come. What was refused is still
read and thrown away by the protocol for `body_s`, so that a client that sends first and reads afterwards sees why.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as AsgiMessage

from skymoe.serve.admission import Admission
from skymoe.serve.config import Limits
from skymoe.serve.errors import ApiError

BODY = "skymoe.body"


class BodyLimit:
    """Reads the body of a POST and puts it into the scope under BODY.

    Args:
        app: gets whole bodies.
        limits: `body_bytes`, `bodies_bytes`.
        admission: counts who is refused.
    """

    def __init__(self, app: ASGIApp, *, limits: Limits, admission: Admission) -> None:
        self._app = app
        self._limits = limits
        self._admission = admission
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        held = 0
        try:
            expected = self._announced(scope)
            self._hold(expected)
            held = expected
            body = bytearray()
            while True:
                message: AsgiMessage = await receive()
                if message["type"] == "http.disconnect":
                    return
                body += message.get("body", b"")
                if len(body) > held:
                    self._hold(len(body) - held)
                    held = len(body)
                if not message.get("more_body", False):
                    break
            await self._app({**scope, BODY: bytes(body)}, receive, send)
        except ApiError as error:
            await error.response()(scope, receive, send)
        finally:
            self._held -= held

    def _announced(self, scope: Scope) -> int:
        """Content-Length, which h11 has checked to be a number and one."""
        lengths = [int(value) for name, value in scope["headers"] if name == b"content-length"]
        return lengths[0] if lengths else 0

    def _hold(self, num_bytes: int) -> None:
        if num_bytes > self._limits.body_bytes:
            raise self._too_large()
        if self._held + num_bytes > self._limits.bodies_bytes:
            self._admission.count_refusal("bodies_full")
            raise ApiError(429, "too much is being sent at once; try again", code="bodies_full", headers={"retry-after": "1"})
        self._held += num_bytes

    def _too_large(self) -> ApiError:
        return ApiError(413, f"a request body has at most {self._limits.body_bytes} bytes", code="body_too_large")
