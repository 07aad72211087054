"""A network of slow links on one machine: a namespace per rank, joined by a bridge, each with its own speed limit.

    rank 0 -- veth --+
    rank 1 -- veth --+-- bridge (a namespace of its own)
    rank 2 -- veth --+

What a rank sends passes a token bucket (tc tbf) at its own end, as it would pass a network card; what it receives is
not limited. Nothing of it can be reached from outside, and the namespaces disappear with the block. Needs root, `ip`
and `tc`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DEVICE = "eth0"


def why_not() -> str | None:
    """What is missing to build such a network here; None when nothing is."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"no {' or '.join(missing)} on this machine"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"probe{os.getpid()}"
    found = subprocess.run(["ip", "netns", "add", name], stderr=subprocess.PIPE, text=True, check=False)
    subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL, check=False)
    return found.stderr.strip() if found.returncode else None


@contextmanager
def network(num_ranks: int) -> Iterator[list[str]]:
    """Names of the ranks' namespaces; links have no limit yet."""
    middle = f"mid{os.getpid()}"
    names = [f"rank{os.getpid()}x{rank}" for rank in range(num_ranks)]
    try:
        for name in (middle, *names):
            _do("ip", "netns", "add", name)
            _do("ip", "-n", name, "link", "set", "lo", "up")
        _do("ip", "-n", middle, "link", "add", "bridge0", "type", "bridge")
        _do("ip", "-n", middle, "link", "set", "bridge0", "up")
        for rank, name in enumerate(names):
            peer = f"port{rank}"
            _do("ip", "-n", middle, "link", "add", peer, "type", "veth", "peer", "name", DEVICE, "netns", name)
            _do("ip", "-n", middle, "link", "set", peer, "master", "bridge0", "up")
            _do("ip", "-n", name, "addr", "add", f"10.77.0.{rank + 1}/24", "dev", DEVICE)
            _do("ip", "-n", name, "link", "set", DEVICE, "up")
        yield names
    finally:
        for name in (*names, middle):
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL, check=False)


def limit(megabits: float | None) -> None:
    """The speed of the link of the namespace in which this process runs; None for no limit."""
    subprocess.run(["tc", "qdisc", "del", "dev", DEVICE, "root"], stderr=subprocess.DEVNULL, check=False)
    if megabits is not None:
        bucket = ("rate", f"{megabits}mbit", "burst", "32kb", "limit", "64mb")
        _do("tc", "qdisc", "add", "dev", DEVICE, "root", "tbf", *bucket)


def bytes_sent() -> int:
    """By this namespace's link since it was made, headers and all."""
    lines = Path("/proc/net/dev").read_text(encoding="ascii").splitlines()
    line = next(line for line in lines if line.strip().startswith(f"{DEVICE}:"))
    return int(line.split(":")[1].split()[8])


def _do(*command: str) -> None:
    subprocess.run(command, check=True)
