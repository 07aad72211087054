"""Where ranks meet, and which sockets listen.

torch's TCPStore listens on every interface of the machine unless it is handed a socket. It has no authentication: who
reaches it can read and change what the ranks tell each other. In a run on one machine nobody else needs to reach it,
so the socket is bound to 127.0.0.1 here and handed over; gloo and NCCL are told to use the loopback interface. Over
several machines the interface is the user's choice (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME), on a network that is
theirs alone: docs/cluster.md. The store of torchrun is torchrun's and listens everywhere; that of `skymoe train --nproc
N` does not.
"""

from __future__ import annotations

import json
import socket
import sys
import time
import uuid
from collections.abc import MutableMapping
from datetime import timedelta
from ipaddress import ip_address
from typing import Any

import torch.distributed as dist

from skymoe.base.errors import MachineError

_POLL_S = 0.02
_MISSING_NAMED = 8


def stay_on_loopback(environment: MutableMapping[str, str]) -> None:
    """Let gloo and NCCL talk over the loopback interface, unless the user has named another."""
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    environment.setdefault("GLOO_SOCKET_IFNAME", loopback)
    environment.setdefault("NCCL_SOCKET_IFNAME", loopback)


def host_store(port: int = 0) -> dist.TCPStore:
    """A store that listens on 127.0.0.1 only; `port` 0 takes a free one (see its attribute `port`)."""
    return serve_store(socket.create_server(("127.0.0.1", port)))


def serve_store(listener: socket.socket) -> dist.TCPStore:
    """A store behind a socket that listens already; the store owns the socket from now on."""
    host, port = listener.getsockname()[:2]
    return dist.TCPStore(host, port, None, True, wait_for_workers=False, master_listen_fd=listener.detach())


def open_store(address: str, port: int, *, hosts: bool, timeout_s: float) -> dist.Store:
    """Connect to the store of the run; with `hosts`, this process serves it.

    Raises:
        MachineError: it cannot be reached in `timeout_s`.
    """
    limit = timedelta(seconds=timeout_s)
    try:
        if hosts and _is_loopback(address):
            return host_store(port)
        return dist.TCPStore(address, port, None, hosts, timeout=limit, wait_for_workers=False)
    except (dist.DistError, OSError) as error:
        raise MachineError(
            f"the meeting point of the ranks, {address}:{port}, cannot be {'opened' if hosts else 'reached'}",
            why=str(error).split("\n")[0],
            hint="check MASTER_ADDR and MASTER_PORT, and that the launcher or rank 0 is alive",
        ) from error


def muster(store: dist.Store, rank: int, size: int, *, timeout_s: float) -> dist.Store:
    """Wait for all ranks of this attempt; returns the part of `store` that belongs to it.

    After a restart (torchrun keeps its store over them) the keys of the dead attempt are still there: addresses of
    processes that are gone, and their last words. No number in the environment tells attempts apart on all machines,
    as torchrun counts restarts on each machine by itself. So every process signs in with a word of its own, rank 0
    calls the list out, and it holds when everybody has heard his own word in it.

    Raises:
        MachineError: somebody did not come in `timeout_s`; rank 0 knows who.
    """
    own = uuid.uuid4().hex
    deadline = time.monotonic() + timeout_s
    store.set_timeout(timedelta(seconds=timeout_s))
    store.set(f"muster/{rank}", own)
    attempt = _call_out(store, size, deadline) if rank == 0 else _hear(store, rank, own, deadline)
    return dist.PrefixStore(f"attempt/{attempt}", store)


def own_connection(store: Any) -> dist.Store:
    """A second connection to the same store: for a thread of its own. (torch's stubs know no `clone`, hence Any.)"""
    connection: dist.Store = store.clone()
    return connection


def attempt_of(store: dist.Store) -> str:
    """The attempt that was called out last; empty before the first."""
    return str(json.loads(store.get("muster/list"))[0]) if store.check(["muster/list"]) else ""


def _call_out(store: dist.Store, size: int, deadline: float) -> str:
    """Rank 0: publish the list until everybody on it has answered to it."""
    keys = [f"muster/{rank}" for rank in range(size)]
    words: list[str] = []
    attempt = ""
    while True:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])] if not words else []
        if not missing:
            now = [word.decode() for word in store.multi_get(keys)]
            if now != words:
                words, attempt = now, uuid.uuid4().hex
                store.set("muster/list", json.dumps([attempt, words]))
            missing = [rank for rank in range(1, size) if not store.check([f"muster/{attempt}/{words[rank]}"])]
            if not missing:
                store.set(f"muster/{attempt}/all", "1")
                return attempt
        if time.monotonic() > deadline:
            raise _nobody_came(missing)
        time.sleep(_POLL_S)


def _hear(store: dist.Store, rank: int, own: str, deadline: float) -> str:
    """Any other rank: answer to every list that has its own word, until all have answered to one."""
    answered = ""
    while time.monotonic() < deadline:
        if store.check(["muster/list"]):
            attempt, words = json.loads(store.get("muster/list"))
            if len(words) > rank and words[rank] == own:
                if attempt != answered:
                    store.set(f"muster/{attempt}/{own}", "1")
                    answered = attempt
                if store.check([f"muster/{attempt}/all"]):
                    return str(attempt)
        time.sleep(_POLL_S)
    raise _nobody_came([])


def _nobody_came(missing: list[int]) -> MachineError:
    named = ", ".join(map(str, missing[:_MISSING_NAMED])) + (" .." if len(missing) > _MISSING_NAMED else "")
    what = f"rank {named} did not come" if missing else "the ranks did not come together"
    return MachineError(f"{what} in time", hint="look at what those processes said, or raise parallel.timeout_s")


def _is_loopback(address: str) -> bool:
    if address == "localhost":
        return True
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return False
