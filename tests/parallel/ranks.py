"""Real gloo ranks for tests: processes forked from a server that has torch loaded, so that eight of them start in well
under a second. Nothing listens outside the loopback interface.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_PRELOAD = ["torch", "torch.distributed", "torch.distributed.pipelining", "skymoe.model.transformer", "skymoe.ops"]


def run_ranks(world_size: int, target: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Run `target(*args)` on `world_size` ranks of one gloo world and return what each returned, by rank.

    `target` is a function of a module (it is found by name), and what it returns crosses a pipe: plain data or CPU
    tensors. The first rank that fails ends all of them, and its traceback is the error.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory() as directory:
        pipes, processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (theirs, Path(directory) / "store", rank, world_size, timeout_s, target, args)
            processes.append(context.Process(target=_rank, args=arguments, daemon=True))
            processes[-1].start()
            theirs.close()
            pipes.append(ours)
        try:
            return _collect(pipes, timeout_s)
        finally:
            for process in processes:
                process.join(0.2)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(pipes: list[Connection], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    waiting: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        ready = wait(list(waiting), timeout_s)
        if not ready:
            raise AssertionError(f"ranks {sorted(waiting.values())} gave no answer within {timeout_s} s")
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                failure, value = pipe.recv()
            except EOFError:
                failure, value = "the process ended without an answer", None
            if failure:
                raise AssertionError(f"rank {rank}: {failure}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    pipe: Connection,
    store: Path,
    rank: int,
    world_size: int,
    timeout_s: float,
    target: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(store), world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        value = target(*args)
        pipe.send_bytes(pickle.dumps(("", value)))  # by value: shared memory would be gone with this process
        dist.barrier()  # nobody leaves while another still talks to it
        dist.destroy_process_group()
    except BaseException:
        pipe.send_bytes(pickle.dumps((traceback.format_exc(), None)))
