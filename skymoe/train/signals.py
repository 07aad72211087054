"""SIGTERM and SIGINT ask for a stop: training ends the step it is in, saves a generation and returns.

The first signal sets a flag and gives the signals back to whoever had them, so a second one acts at once: Ctrl-C
twice raises KeyboardInterrupt, a second SIGTERM ends the process. Either way the last generation on disk is whole.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from skymoe.base.log import logger


class StopRequest:
    """Whether, and by which signal, the run was asked to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def watch_signals() -> Iterator[StopRequest]:
    """Listen for SIGTERM and SIGINT in the block (in the main thread: Python allows no handlers elsewhere)."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def give_back() -> None:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def on_signal(number: int, frame: FrameType | None) -> None:
        request.signal = signal.Signals(number)
        give_back()
        logger.warning("%s: stopping after this step and saving; a second one stops at once", request.signal.name)

    for number in previous:
        signal.signal(number, on_signal)
    try:
        yield request
    finally:
        give_back()
