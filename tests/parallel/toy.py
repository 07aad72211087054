"""A small real program for launchers: ranks that add numbers up to the last step, and meet a fault on the way.

python toy.py STEPS [FAULT RANK STEP [TIMEOUT]]
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from skymoe.base.errors import SkymoeError
from skymoe.parallel.agree import any_of
from skymoe.parallel.launch import World, distributed
from skymoe.parallel.mesh import Group
from skymoe.parallel.watch import watching


def fault(kind: str) -> None:
    """Meet it."""
    match kind:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "memory":
            limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + (64 << 20)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            torch.ones(1 << 30)
        case "disk":
            with open(os.environ["TOY_DISK"] + "/file", "wb") as file:
                file.write(bytes(16 << 20))
        case "defect":
            raise KeyError("a defect")
        case "sleep":
            time.sleep(1000)
        case "exit":
            os._exit(7)
        case "once":
            if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                os.kill(os.getpid(), signal.SIGKILL)


def work(world: World, timeout_s: float, steps: int, kind: str, rank: int, at: int) -> int:
    asked = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: asked.append(number))
    group = Group(tuple(range(world.size)), world.rank, dist.group.WORLD if world.is_distributed else None)
    total = torch.zeros(())
    with watching(world, timeout_s=timeout_s) as heart:
        for step in range(steps):
            heart.phase("compute", step)
            if (step, world.rank) == (at, rank):
                fault(kind)
            own = torch.tensor(float(step + world.rank))
            heart.phase("add", step, waits=True)
            if world.is_distributed:
                dist.all_reduce(own)
            total += own
            if any_of(bool(asked), group):
                return 75
            if "TOY_SLOW" in os.environ:
                time.sleep(float(os.environ["TOY_SLOW"]))
                print(f"pid {os.getpid()} step {step}", file=sys.stderr, flush=True)
    if world.rank == 0:
        print(f"total {total.item()}", flush=True)
    return 0


def main() -> int:
    steps, kind, rank, at, timeout_s = (*sys.argv[1:], *("5", "none", "-1", "-1", "20")[len(sys.argv) - 1 :])
    try:
        with distributed(float(timeout_s) + 10, device="cpu") as world:
            return work(world, float(timeout_s), int(steps), kind, int(rank), int(at))
    except SkymoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
