"""A worker does not outlive its launcher, and knows whether it speaks for all. No torch: both come before all else."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping

LAUNCHER = "SKYMOE_LAUNCHER_PID"
_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


def die_with_launcher(environment: Mapping[str, str] = os.environ) -> None:
    """Ask the kernel to kill this process when the launcher dies, however that dies. Linux; elsewhere nothing happens.

    Only under our own launcher, whose process id is in the environment: torchrun ends its workers itself, and a worker
    that it was to leave alone would be none.
    """
    launcher = environment.get(LAUNCHER, "")
    if not launcher.isdecimal() or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(launcher):  # it died before we asked
        os._exit(3)


def is_first_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is rank 0, or alone: it shows progress and prints the result."""
    return environment.get("RANK", "0") == "0"
