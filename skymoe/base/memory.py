"""The C allocator's habit that costs a CPU training step up to a sixth of its time, and how to break it.

glibc serves every large block straight from the kernel and gives it back when it is freed. A training step frees and
takes the same activations over and over: each time the kernel maps fresh pages and fills them with zeros, a pass over
memory that nobody asked for. Told to keep large blocks, the process reuses its own pages (figures in
docs/performance.md).
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of <malloc.h>


def keep_freed_memory() -> bool:
    """Let this process keep what it frees; its size stays at the peak. Returns whether the allocator took the advice.

    Process-wide and for good, so only a job that owns the process calls it. glibc only; elsewhere nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    try:
        mallopt = library.mallopt
    except AttributeError:  # musl has none
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
