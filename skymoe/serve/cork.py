"""A transport that puts what is written in one turn of the event loop into one `send`.

uvicorn writes the head of an answer and its body apart, and each event of a stream; a system call costs more than all
of our own work on a small answer, and in a flood that decides how long others wait.
"""

from __future__ import annotations

import asyncio
from typing import Any

_FLUSH_BYTES = 1 << 16


class Cork(asyncio.Transport):
    """Holds back writes until the loop turns; everything else is the inner transport's.

    Args:
        inner: the connection.
        loop: whose turns count.
    """

    def __init__(self, inner: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._inner = inner
        self._loop = loop
        self._held = bytearray()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self._held and data:
            self._loop.call_soon(self._flush)
        self._held += data
        if len(self._held) > _FLUSH_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._held:
            held, self._held = self._held, bytearray()
            if not self._inner.is_closing():  # the client may have gone meanwhile
                self._inner.write(held)

    def write_eof(self) -> None:
        self._flush()
        try:
            self._inner.write_eof()
        except OSError:  # the client has reset the connection, and the loop is not told yet
            self._inner.abort()

    def close(self) -> None:
        self._flush()
        self._inner.close()

    def can_write_eof(self) -> bool:
        return self._inner.can_write_eof()

    def abort(self) -> None:
        self._held.clear()
        self._inner.abort()

    def is_closing(self) -> bool:
        return self._inner.is_closing()

    def pause_reading(self) -> None:
        self._inner.pause_reading()

    def resume_reading(self) -> None:
        self._inner.resume_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._inner.get_extra_info(name, default)
