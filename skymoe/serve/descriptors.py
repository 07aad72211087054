"""How many connections this process has file descriptors for.

Each connection is an open file, and a process may often open 1024 of them or fewer (`ulimit -n`). Where `accept` finds
none left, asyncio logs a traceback for each try and takes nobody in for a second. So the limit is raised as far as
the system allows, and where that is too little fewer connections are let in, which is said.

A connection too many is still accepted, to be told 503, and so are some before the first of them is told: the event
loop accepts ACCEPT_BURST at a turn, and a connection is closed several turns later. Those have room of their own.
"""

from __future__ import annotations

import contextlib
import resource

from skymoe.base.errors import MachineError
from skymoe.base.log import logger

ACCEPT_BURST = 8
"""connections that are accepted in one turn of the event loop"""
SURPLUS = 16
"""connections beyond the limit that have a moment to read why; more are told and closed at once"""

_TURNS = 4  # accepted, made, told, closed
_OWN = 40  # standard streams, the event loop, the engine, the template's process, files that are read for a moment
_RESERVE = _OWN + SURPLUS + _TURNS * ACCEPT_BURST


def room_for(connections: int) -> int:
    """How many of `connections` there are descriptors for, when the process may have as many as it needs, or can.

    Raises:
        MachineError: not even one.
    """
    most = _raise_limit(connections + _RESERVE)
    room = min(connections, most - _RESERVE)
    if room < 1:
        raise MachineError(
            f"a process may open {most} files here; the server needs {_RESERVE + 1}", hint=f"ulimit -n {4 * _RESERVE}"
        )
    if room < connections:
        logger.warning(
            f"a process may open {most} files here, so {room} connections are let in at once and not"
            f" {connections} (limits.connections); ulimit -n {connections + _RESERVE} makes room for all"
        )
    return room


def _raise_limit(needed: int) -> int:
    """Raise the soft limit to `needed` if it is lower, or as near as the hard one lets; how many there are then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return needed
    wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    with contextlib.suppress(ValueError, OSError):  # some systems have a lower bound than they say
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return soft
