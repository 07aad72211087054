"""One rank of a profile: all ranks do the same thing at the same time, for they share the machine when they train.

While the last rank runs the head, the others run layers, as they do in a pipeline. Medians are formed on each rank and
averaged over ranks (the head is the last rank's alone).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from skymoe.base.memory import keep_freed_memory
from skymoe.parallel.lifeline import die_with_launcher
from skymoe.parallel.mesh import Group, alone
from skymoe.plan.hardware.profile import LinkFit
from skymoe.profile.config import ProfileConfig
from skymoe.profile.layers import Batch, Pieces, task_name
from skymoe.profile.links import measure_links
from skymoe.profile.machine import (
    Size,
    gemm_task,
    memory_bytes,
    model_sizes,
    spread_sizes,
    stream_task,
    title,
    update_task,
)
from skymoe.profile.timing import WARM_UP, Clock, Task, Timed, interleaved
from skymoe.spec.model import ModelSpec


@dataclass(frozen=True)
class Found:
    """What a rank has measured; plain data, to be sent."""

    times: dict[str, Timed]
    kept: dict[str, float]
    sizes: tuple[Size, ...]
    stream_bytes: float
    updated: int
    links: dict[str, LinkFit]
    is_thread_clock: bool
    title: str
    memory: float


Tell = Callable[[str], None]


def rank_main(pipe: Connection, store: Path, rank: int, config: ProfileConfig, spec: ModelSpec, launcher: int) -> None:
    """A process: measures, tells its steps, and then what it found (rank 0) or nothing; or what went wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher decides
    die_with_launcher({"SKYMOE_LAUNCHER_PID": str(launcher)})
    try:
        pipe.send(("done", _run(rank, store, config, spec, lambda step: pipe.send(("step", step)))))
    except Exception as error:
        pipe.send(("failed", f"{type(error).__name__}: {error}"))


def _run(rank: int, store: Path, config: ProfileConfig, spec: ModelSpec, tell: Tell) -> Found:
    device = _own_device(config, rank)
    if device.type == "cpu":
        _own_cores(rank, config)
        keep_freed_memory()
    group = alone(0)
    if config.ranks > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", store=dist.FileStore(str(store), config.ranks), rank=rank,
            world_size=config.ranks, timeout=timedelta(seconds=config.timeout_s),
        )  # fmt: skip
        group = Group(tuple(range(config.ranks)), rank, dist.group.WORLD)
    try:
        return measure(config, spec, group, device, tell)
    finally:
        if config.ranks > 1:
            dist.destroy_process_group()


def measure(config: ProfileConfig, spec: ModelSpec, group: Group, device: torch.device, tell: Tell) -> Found:
    """Everything, on a rank of `group`."""
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    batch = Batch(config.tokens, config.micro_batch, dtype, device, config.seed)
    tell("build")
    pieces = Pieces(spec, batch, config.layers)
    kept = pieces.kept()
    sizes = tuple(dict.fromkeys([*model_sizes(spec, batch.num_tokens), *spread_sizes(config.gemms, device.type)]))
    stream, stream_bytes = stream_task(device)
    update, updated = update_task(device)
    tasks = {**pieces.tasks(), "stream": stream, "update": update}
    tasks |= {f"gemm.{number}": gemm_task(size, dtype, device) for number, size in enumerate(sizes)}
    clock = Clock(device, config.threads)
    filler = tasks[task_name(next(iter(pieces.kinds)), "layer", False)]
    if group.rank != group.size - 1:
        tasks["head"] = filler
    times = _in_step(tasks, config.repeats, clock, group, tell)
    times = mean_over_ranks(times, group, device, only_last={"head"})
    rows = {name for name in times if name.startswith(("moe.", "dense."))}
    times = {
        name: _per_layer(timed, _rows_of(pieces, name)) if name in rows else timed for name, timed in times.items()
    }
    links = measure_links(group, device, config.repeats, tell) if group.size > 1 else {}
    memory = memory_bytes(device, group.size)
    return Found(times, kept, sizes, stream_bytes, updated, links, clock.is_thread, title(device), memory)


def num_steps(config: ProfileConfig) -> int:
    """How often `measure` tells a step."""
    return 1 + (WARM_UP + config.repeats) * (1 if config.ranks == 1 else 2)


def _in_step(tasks: Mapping[str, Task], rounds: int, clock: Clock, group: Group, tell: Tell) -> dict[str, Timed]:
    first = next(iter(tasks))

    def before(name: str) -> None:
        if name == first:
            tell("time")
        if group.handle is not None:
            dist.barrier(group=group.handle)

    return interleaved(tasks, rounds, clock, before)


def mean_over_ranks(
    times: Mapping[str, Timed], group: Group, device: torch.device, *, only_last: set[str]
) -> dict[str, Timed]:
    """Means, or for some the last rank's own; the same on every rank."""
    if group.handle is None:
        return dict(times)
    seconds = [[timed.forward_s, timed.backward_s, timed.spread] for timed in times.values()]
    mine = torch.tensor(seconds, dtype=torch.float64, device=device)
    rows = [torch.empty_like(mine) for _ in group.ranks]
    dist.all_gather(rows, mine, group=group.handle)
    mean, last = torch.stack(rows).mean(0).tolist(), rows[-1].tolist()
    return {name: Timed(*(last if name in only_last else mean)[place]) for place, name in enumerate(times)}


def _rows_of(pieces: Pieces, name: str) -> int:
    return len(pieces.kinds[name.startswith("moe.")])


def _per_layer(timed: Timed, layers: int) -> Timed:
    return replace(timed, forward_s=timed.forward_s / layers, backward_s=timed.backward_s / layers)


def _own_device(config: ProfileConfig, rank: int) -> torch.device:
    device = torch.device(config.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or rank)
        torch.cuda.set_device(device)
    return device


def _own_cores(rank: int, config: ProfileConfig) -> None:
    """Threads of different ranks on different cores, where there are enough."""
    torch.set_num_threads(config.threads)
    if not sys.platform.startswith("linux"):
        return
    cores = sorted(os.sched_getaffinity(0))
    if config.ranks * config.threads <= len(cores):
        os.sched_setaffinity(0, set(cores[rank * config.threads : (rank + 1) * config.threads]))
