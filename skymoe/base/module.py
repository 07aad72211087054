"""Start a module of ours in a process of its own."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

_ROOT = Path(__file__).parents[2]


def module_command(name: str, *arguments: object) -> list[str]:
    """`python -m name` by this very interpreter, which does not look for modules in the working directory.

    `-m` alone puts that first, and it may be a model's: a `torch.py` in it would be run. Only where the directory is
    the one that this package itself was loaded from it stays, for a source tree that is not installed.
    """
    at_home = False
    with suppress(OSError):
        at_home = os.path.samefile(_ROOT, os.curdir)
    return [sys.executable, *([] if at_home else ["-P"]), "-m", name, *map(str, arguments)]
