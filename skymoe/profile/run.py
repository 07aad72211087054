"""`skymoe plan profile`: measure this machine with a model's modules, and write what the planner reads.

The ranks are processes of their own (worker.py); this one shows progress, gathers and writes. Interrupted, it ends
them and leaves no file, and an old file as it was.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from skymoe.base.errors import ConfigError, MachineError
from skymoe.base.files import write_atomic
from skymoe.base.progress import Progress, progress
from skymoe.ops.device import usable_device
from skymoe.plan.hardware.profile import Profile
from skymoe.plan.shape import layer_parameters, shape_of
from skymoe.profile.assemble import assemble
from skymoe.profile.config import ProfileConfig
from skymoe.profile.layers import kinds_of
from skymoe.profile.machine import memory_bytes
from skymoe.profile.worker import Found, num_steps, rank_main
from skymoe.spec.model import ModelSpec
from skymoe.spec.named import read_model

_GRACE_S = 2.0


def run(config: ProfileConfig) -> Profile:
    """Measure, write `config.out`, and return what is in it.

    Raises:
        FormatError: neither a preset nor a readable model directory.
        ConfigError: device, ranks and threads do not go together.
        MachineError: a rank failed; no space, no permission.
    """
    spec = read_model(config.model)
    _check(config)
    _check_memory(config, spec)
    load = os.getloadavg()[0]
    with progress("profile", num_steps(config), "round") as bar:
        found = measure_ranks(config, spec, bar)
    profile = assemble(config, spec, found, load)
    write_atomic(config.out, (json.dumps(profile.model_dump(mode="json"), indent=1) + "\n").encode())
    return profile


def measure_ranks(config: ProfileConfig, spec: ModelSpec, bar: Progress) -> Found:
    """Start the ranks and wait for them; none is left behind."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        pipes: list[Connection] = []
        processes: list[BaseProcess] = []
        with _ended(processes):
            for rank in range(config.ranks):
                ours, theirs = context.Pipe(duplex=False)
                arguments = (theirs, Path(directory) / "store", rank, config, spec, os.getpid())
                processes.append(context.Process(target=rank_main, args=arguments, daemon=True))
                processes[-1].start()
                theirs.close()
                pipes.append(ours)
            return _gather(pipes, bar, config.timeout_s)


def _gather(pipes: list[Connection], bar: Progress, timeout_s: float) -> Found:
    results: dict[int, Found] = {}
    waiting: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        ready = wait(list(waiting), timeout_s)
        if not ready:
            raise MachineError(f"no rank gave a sign within {timeout_s:g} s", hint="fewer layers, tokens or ranks")
        for pipe in ready:
            rank = waiting[pipe]
            kind, value = _receive(pipe)
            if kind == "failed":
                raise MachineError(f"rank {rank} of the profile failed", why=value, hint="fewer layers or ranks")
            if kind == "done":
                results[rank] = value
                del waiting[pipe]
            elif rank == 0:
                bar.advance(doing=value)
    return results[0]


def _receive(pipe: Any) -> tuple[str, Any]:
    try:
        kind, value = pipe.recv()
    except EOFError:
        return "failed", "the process ended without a word (killed for its memory?)"
    return kind, value


@contextmanager
def _ended(processes: list[BaseProcess]) -> Iterator[None]:
    """At the end of the block nothing of them is left."""
    try:
        yield
    except BaseException:
        for process in processes:
            process.kill()
        raise
    finally:
        for process in processes:
            process.join(_GRACE_S)
            process.kill()
            process.join()


def _check(config: ProfileConfig) -> None:
    device = usable_device(config.device, where="--device")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"a profile is of cpu or cuda, not of {device.type}", where="--device")
    if device.type == "cuda" and config.ranks > 1:
        if device.index is not None:
            raise ConfigError(
                f"{device} is one GPU, and there are {config.ranks} ranks", where="--device",
                hint="--ranks 1, or --device cuda: each rank takes a GPU",
            )  # fmt: skip
        if config.ranks > (count := torch.cuda.device_count()):
            what = f"{config.ranks} ranks need as many GPUs, there are {count}"
            raise ConfigError(what, where="--ranks", hint=f"--ranks {count}")
    if not config.out.parent.is_dir():
        raise ConfigError("the directory of the output does not exist", where=config.out)
    if config.out.is_dir():
        raise ConfigError("the output is a directory", where=config.out, hint="a file name, profile.json")


def _check_memory(config: ProfileConfig, spec: ModelSpec) -> None:
    """Refuse what cannot be: better before than by the hand of the system, which may end others."""
    shape = shape_of(spec)
    built = [layer for ids in kinds_of(spec, config.layers).values() for layer in ids]
    layers = sum(layer_parameters(shape.layers[layer], shape.hidden_size) for layer in built)
    tables = shape.hidden_size * shape.vocab_size * (1 if shape.tied else 2)
    needed = (layers + tables) * 8.0  # weights and gradients, fp32
    available = memory_bytes(torch.device(config.device), config.ranks if config.device == "cpu" else 1)
    if needed > available:
        raise MachineError(
            f"{config.ranks} rank(s) with {len(built)} layer(s) need {needed / 1e9:.0f} GB each",
            where=config.model,
            why=f"each can have {available / 1e9:.0f} GB here",
            hint="a smaller --layers or --ranks" if len(built) + config.ranks > 2 else "a smaller model",
        )
