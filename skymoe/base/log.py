"""One logger for the package. It writes to standard error; standard output carries results only."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

logger = logging.getLogger("skymoe")


class _StandardError(logging.StreamHandler[TextIO]):
    """Looks up `sys.stderr` for every line: a progress bar replaces it so that lines appear above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def setup_logging(verbosity: int = 0) -> None:
    """Send the package's log lines to standard error. Called by the command line, never at import.

    Args:
        verbosity: -1 warnings only, 0 information, 1 debugging.
    """
    handler = _StandardError(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel({-1: logging.WARNING, 0: logging.INFO}.get(verbosity, logging.DEBUG))
    logger.propagate = False
