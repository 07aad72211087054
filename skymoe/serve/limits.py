"""ASGI middleware: how long a body may be, how much of all bodies may lie in memory.

A length that is announced is judged before a byte is read; chunks are counted as they come. What was refused is still
read and thrown away by the protocol for `body_s`, so that a client that sends first and reads afterwards sees why.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as AsgiMessage

from skymoe.serve.admission import Admission
from skymoe.serve.config import Limits
from skymoe.serve.errors import BODY, ApiError


class BodyLimit:
    """Reads the body of a POST and puts it into the scope under BODY.

    Args:
        app: gets whole bodies.
        limits: `body_bytes`, `bodies_bytes`.
        admission: counts who is refused.
        queued: paths whose requests need a place. When there is none they are told at once: in a flood, a refusal that
            costs little is what keeps the server answering.
    """

    def __init__(self, app: ASGIApp, *, limits: Limits, admission: Admission, queued: frozenset[str]) -> None:
        self._app = app
        self._queued = queued
        self._limits = limits
        self._admission = admission
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        held = 0
        try:
            if scope["path"] in self._queued:
                self._admission.check_room()
            held = self._hold(self._announced(scope), 0)
            body = bytearray()
            while True:
                message: AsgiMessage = await receive()
                if message["type"] == "http.disconnect":
                    return
                body += message.get("body", b"")
                held = self._hold(len(body), held)
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

    def _hold(self, total: int, held: int) -> int:
        """Room for `total` bytes of one body that has room for `held` already; how much it has now."""
        if total > self._limits.body_bytes:
            message = f"a request body has at most {self._limits.body_bytes} bytes"
            raise ApiError(413, message, code="body_too_large")
        more = max(total - held, 0)
        if self._held + more > self._limits.bodies_bytes:
            self._admission.count_refusal("bodies_full")
            message = "too much is being sent at once; try again"
            raise ApiError(429, message, code="bodies_full", headers={"retry-after": "1"})
        self._held += more
        return held + more
