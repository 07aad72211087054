"""Answers that take a while: the work ends when the client goes away, and streams as server-sent events.

Starlette does not end a handler when its client disconnects before the answer has begun; then the engine would go on
for nobody. Here the work and the wait for the disconnect run side by side, and whichever ends first ends the other.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, TypeAlias

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from skymoe.serve.errors import ApiError

Events: TypeAlias = AsyncGenerator[bytes, None]
"""JSON texts."""

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Work(Response):
    """An answer that is made while it is awaited: `make` gets what sends it.

    Args:
        make: does the work and sends one answer.
    """

    def __init__(self, make: Callable[[Send], Coroutine[Any, Any, None]]) -> None:
        super().__init__()
        self._make = make

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._make(send))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not work.done():
                work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_json(send: Send, body: bytes) -> None:
    """One JSON answer, 200."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def send_events(send: Send, events: Events) -> None:
    """A stream: `data: {...}` per event, `data: [DONE]` last.

    An error before the first event is an answer of its own; later it is an event, as the status has been sent.
    """
    started = False

    async def start() -> None:
        nonlocal started
        started = True
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})

    async with contextlib.aclosing(events):
        try:
            async for event in events:
                if not started:
                    await start()
                await _send_event(send, event)
        except ApiError as error:
            if not started:
                raise
            await _send_event(send, error.body)
        if not started:
            await start()
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


def _send_event(send: Send, data: bytes) -> Awaitable[None]:
    return send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})
