"""From the environment of a launcher to an initialised world, and out of it again.

Whoever starts the processes (torchrun, SLURM, `skymoe train --nproc`) tells each one by environment variables who it
is and where all of them meet: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. `distributed` turns that into a
`World` and initialises torch.distributed with it: gloo on CPU, NCCL on CUDA. Without these variables the process is a
world of one, and nothing is touched.

What it does beyond `init_process_group`:
  - in a run on one machine every socket that listens is on the loopback interface (see sockets.py);
  - ranks meet under a fresh prefix of the store in every attempt (`muster`): a restarted run must not read what the
    dead one left there;
  - leaving cannot hang: after an error nobody waits for ranks that will not come.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from skymoe.base.errors import ConfigError, MachineError, SkymoeError
from skymoe.parallel.lifeline import die_with_launcher
from skymoe.parallel.sockets import muster, open_store, stay_on_loopback

_GRACE_S = 5.0  # the watchdog, which names the culprit, must come before the time-out of a collective, which cannot


@dataclass(frozen=True)
class Place:
    """What a launcher tells a process."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int
    is_served: bool  # the launcher hosts the store; otherwise rank 0 does

    @property
    def is_on_one_machine(self) -> bool:
        """Whether no rank is on another machine."""
        return self.local_size == self.size or self.address in ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class World:
    """All ranks of a run, as one of them sees it.

    Attributes:
        rank, size: this one, and how many there are.
        local_rank: among the ranks of this machine.
        device: of its tensors.
        store: where ranks leave each other small messages; None in a world of one. Not for two threads at once: a
            thread of its own takes an `own_connection`.
        is_distributed: whether torch.distributed is initialised.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    store: dist.Store | None
    is_distributed: bool


def read_place(environment: Mapping[str, str]) -> Place | None:
    """What `environment` says about this process; None when no launcher has set anything.

    Raises:
        ConfigError: a variable is missing, or no number, or they contradict each other.
    """
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & environment.keys():
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if not environment.get(name)]:
        raise ConfigError(
            f"{', '.join(missing)} not set, but {', '.join(sorted(set(names) & environment.keys()))} are",
            where="environment",
            why="a launcher sets all of them",
            hint="torchrun --nproc-per-node N -m skymoe train .., or skymoe train .. --nproc N",
        )

    def number(name: str, below: int) -> int:
        value = environment[name]
        if not value.isdecimal() or not int(value) < below:
            raise ConfigError(f"{name} is {value!r}, not a number below {below}", where="environment")
        return int(value)

    size = number("WORLD_SIZE", 2**20)
    local_size = number("LOCAL_WORLD_SIZE", size + 1) if "LOCAL_WORLD_SIZE" in environment else 0
    return Place(
        rank=number("RANK", size),
        size=size,
        local_rank=number("LOCAL_RANK", local_size or size),
        local_size=local_size,
        address=environment["MASTER_ADDR"],
        port=number("MASTER_PORT", 2**16),
        is_served=environment.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() == "true",
    )


@contextmanager
def distributed(timeout_s: float, *, device: str | torch.device = "cpu") -> Iterator[World]:
    """The world that the launcher has made, for the time of the block.

    Args:
        timeout_s: how long ranks wait for each other, at the start and in every collective.
        device: `cpu`, or `cuda`, of which each rank takes the one of its local rank.

    Raises:
        ConfigError: environment or device cannot be used.
        MachineError: the ranks did not come together.
    """
    asked = torch.device(device)
    place = read_place(os.environ)
    if place is None or place.size == 1:
        yield World(0, 1, 0 if place is None else place.local_rank, asked, None, False)
        return
    die_with_launcher()
    own = _own_device(asked, place)
    if place.is_on_one_machine:
        stay_on_loopback(os.environ)
    store = open_store(place.address, place.port, hosts=place.rank == 0 and not place.is_served, timeout_s=timeout_s)
    store = muster(store, place.rank, place.size, timeout_s=timeout_s)
    _initialise(store, place, own, timeout_s)
    world = World(place.rank, place.size, place.local_rank, own, store, True)
    try:
        yield world
        dist.barrier()  # nobody leaves while another still talks to it
    except BaseException as error:
        _leave_behind(error)
        raise
    dist.destroy_process_group()


def _leave_behind(error: BaseException) -> None:
    """End torch.distributed after an error. Messages under way to ranks that do not answer must not hold us up."""
    thread = threading.Thread(target=dist.destroy_process_group, daemon=True)
    thread.start()
    thread.join(_GRACE_S)
    if thread.is_alive():  # neither would the interpreter come to its end
        sys.stderr.write(f"error: {error}\n")
        sys.stderr.flush()
        os._exit(error.exit_code if isinstance(error, SkymoeError) else 3)


def _initialise(store: dist.Store, place: Place, device: torch.device, timeout_s: float) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=place.rank,
            world_size=place.size,
            timeout=timedelta(seconds=timeout_s + _GRACE_S),
            device_id=device if device.type == "cuda" else None,
        )
    except RuntimeError as error:
        raise MachineError(f"rank {place.rank} could not connect to the others", why=str(error)) from error


def _own_device(asked: torch.device, place: Place) -> torch.device:
    """The device of this rank."""
    if asked.type == "cpu":
        return torch.device("cpu")
    if asked.type != "cuda":
        raise ConfigError(f"several ranks run on cpu or cuda, not on {asked.type}", where="run.device")
    if asked.index is not None:
        raise ConfigError(
            f"{asked} is one GPU, and there are {place.size} ranks",
            where="run.device",
            hint="run.device=cuda: each rank takes the GPU of its local rank",
        )
    if place.local_rank >= torch.cuda.device_count():
        raise MachineError(
            f"local rank {place.local_rank} has no GPU: this machine has {torch.cuda.device_count()}",
            where="run.device",
            hint="start as many processes per machine as it has GPUs, or run.device=cpu",
        )
    return torch.device("cuda", place.local_rank)
