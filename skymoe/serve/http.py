"""uvicorn's HTTP/1.1 protocol with what it lacks: deadlines, and a bound of the head.

uvicorn waits for the rest of a request for ever. Here a request line with its headers has `header_s`, from the start of
the connection or from their first byte; the body has `body_s` from there; and a client that does not take its answer
`write_s`. A head of more than `header_bytes` is answered with 431, what is no HTTP with 400, what is late with 408, one
connection too many with 503, and the connection is closed: first our half, then the rest when the client has had a
moment to read why (a socket closed with bytes unread resets the connection, and the answer is lost); at once when
too many have such a moment already.
A body has one length: Content-Length beside Transfer-Encoding, of which a proxy in front may believe the other one
(request smuggling, RFC 9112 section 6.1), is refused with 400; a coding other than chunked with 501.
Bodies are bounded in `limits.py`, but for a chunk that announces too much, which is refused here before it comes. TLS
and HTTP/2 are left to a proxy in front.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from h11._readers import ChunkedReader
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from skymoe.serve.config import Limits
from skymoe.serve.cork import Cork
from skymoe.serve.descriptors import SURPLUS
from skymoe.serve.errors import raw_answer

_LINGER_S = 1.0
_WHY = {
    431: "the request's headers are too large",
    501: "Transfer-Encoding: the only coding that is understood is `chunked`, once",
}
_CODES = {413: "body_too_large"}


class _Connection(h11.Connection):
    """h11's, with a bound of the head that also holds for one that arrives whole, and what it refuses, and why.

    Attributes:
        refused_with: the status.
        why: for the client.
        in_head: whether it was in the head of a request, which has no answer yet then.
        num_requests: heads that have arrived whole.
    """

    def __init__(self, limits: Limits) -> None:
        super().__init__(h11.SERVER, max_incomplete_event_size=limits.header_bytes)
        self._limits = limits
        self.refused_with = 400
        self.why = ""
        self.in_head = False
        self.num_requests = 0

    def next_event(self) -> Any:
        self.in_head = self.their_state is h11.IDLE
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            self.refused_with = error.error_status_hint
            self.why = _WHY.get(self.refused_with, "this is not HTTP/1.1")
            raise
        if isinstance(event, h11.Request):
            self.num_requests += 1
            self._check_head(event)
        elif isinstance(self._reader, ChunkedReader):
            here = len(event.data) if isinstance(event, h11.Data) else 0
            # h11 tells nobody what a chunk announces; who reads the number again may read another one
            if self._reader._bytes_in_chunk + here > self._limits.body_bytes:
                raise self._refusal(413, f"a request body has at most {self._limits.body_bytes} bytes")
        return event

    def _check_head(self, request: h11.Request) -> None:
        names = {name for name, _ in request.headers}
        if (
            len(request.target) + sum(len(name) + len(value) + 4 for name, value in request.headers)
            > self._limits.header_bytes
        ):
            raise self._refusal(431, _WHY[431])
        if {b"transfer-encoding", b"content-length"} <= names:
            raise self._refusal(400, "a request has Content-Length or Transfer-Encoding, not both")

    def _refusal(self, status: int, why: str) -> h11.RemoteProtocolError:
        self.refused_with, self.why = status, why
        return h11.RemoteProtocolError(why, error_status_hint=status)


class BoundedProtocol(H11Protocol):
    """One connection.

    Args:
        limits: the bounds.
        config, server_state, app_state, _loop: as uvicorn gives them.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn: _Connection = _Connection(limits)
        self._limits = limits
        self._awaited: tuple[str, int] | None = None  # what is to arrive next, of which request
        self._clock: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(Cork(transport, self.loop))
        if len(self.connections) > self._limits.connections:
            self._refuse(503, "too many connections", {"retry-after": "1"}, in_head=True)
        else:
            self._expect("head")

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect(None)
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._refused:
            super().data_received(data)
            self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing = self.loop.call_later(self._limits.write_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def send_400_response(self, msg: str) -> None:
        """What h11 cannot read, or we do not take."""
        self._refuse(self.conn.refused_with, self.conn.why, in_head=self.conn.in_head)

    def _watch(self) -> None:
        """What is to arrive next, by what has."""
        state = self.conn.their_state
        if self._refused:
            return
        if state is h11.SEND_BODY:
            self._expect("body")
        elif state is h11.IDLE and self.conn.trailing_data[0]:
            self._expect("head")
        elif state is not h11.IDLE or self.conn.num_requests:  # between requests uvicorn's own clock runs
            self._expect(None)

    def _expect(self, what: str | None) -> None:
        """Start a clock, unless it runs already."""
        awaited = None if what is None else (what, self.conn.num_requests)
        if awaited == self._awaited:
            return
        if self._clock is not None:
            self._clock.cancel()
        self._awaited, self._clock = awaited, None
        if what is not None:
            seconds = self._limits.header_s if what == "head" else self._limits.body_s
            self._clock = self.loop.call_later(seconds, self._late, what)

    def _late(self, what: str) -> None:
        self._refuse(408, f"the {what} of the request did not arrive in time", in_head=what == "head")

    def _refuse(self, status: int, message: str, headers: dict[str, str] | None = None, *, in_head: bool) -> None:
        """Answer, unless the request has an answer already, and close. In its head it has none."""
        self._expect(None)
        self._refused = True
        if self.transport.is_closing():
            return
        answering = self.cycle is not None and self.cycle.response_started
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if not answering or (self.cycle.response_complete and in_head):
            self.transport.write(raw_answer(status, message, headers or {}, code=_CODES.get(status)))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self.loop.call_later(_LINGER_S, self.transport.abort)
        if len(self.connections) > self._limits.connections + SURPLUS:
            self.transport.close()
