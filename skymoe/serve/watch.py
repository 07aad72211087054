"""ASGI middleware around everything: counts answers, and keeps defects of ours in the request where they show.

A defect is logged with its traceback; the client learns that it happened (`answer_defect`) and nothing else.
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from skymoe.base.errors import printable
from skymoe.base.log import logger
from skymoe.serve.metrics import Metrics


class Watch:
    """The outermost layer.

    Args:
        app: everything else.
        metrics: where answers are counted.
        routes: paths that are counted by their name; all others are "other".
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, routes: frozenset[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        status, complete = 0, False

        async def note(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                complete = not message.get("more_body", False)
            await send(message)

        path = scope["path"]
        try:
            await self._app(scope, receive, note)
        except asyncio.CancelledError:
            raise
        except Exception:
            logger.exception(f"a defect while answering {scope['method']} {printable(path, 200)}")
            if not complete:
                raise  # the answer has begun: the connection is cut off
        finally:
            self._metrics.answered(path if path in self._routes else "other", status)
            logger.debug(f"{scope['method']} {printable(path, 200)} {status or 'gone'}")
