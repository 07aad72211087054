"""Ctrl-C between steps, never within one.

A step that is cut off leaves ranks in the middle of an exchange, and the engine is of no use any more. So while a step
runs in the user's own thread, SIGINT is kept and raised as KeyboardInterrupt when the step has ended: within a second.
The next one does not wait: where a rank hangs, two Ctrl-C end it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def whole_step() -> Iterator[None]:
    """Let the block end before a KeyboardInterrupt is raised. Does nothing outside the main thread."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    kept: list[FrameType | None] = []

    def keep(number: int, frame: FrameType | None) -> None:
        if kept:
            before(number, frame)
        kept.append(frame)

    signal.signal(signal.SIGINT, keep)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if kept:
        before(signal.SIGINT, kept[0])
