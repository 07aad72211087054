"""Helpers of the generation fault tests: small states that are a function of the step, and children to be killed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from skymoe.weights.generation import Generation, save_generation


def state_of(step: int) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of `step`, odd shapes and several dtypes, about 3 kB."""
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(7, 11, generator=generator)
    return {
        "model": {"w": weight, "half": weight[:3].bfloat16(), "flag": weight[0] > 0, "empty": torch.zeros(0, 3)},
        "optimizer": {"w/exp_avg": weight * 2, "w/step": torch.tensor(float(step))},
    }


def save(root: Path, step: int, keep: int = 3) -> Path:
    """Save the state of `step`."""
    document = {"step": step, "alpha": [0.01 / 3, step / 7]}
    return save_generation(root, step, tensors=state_of(step), documents={"state": document}, layout={}, keep=keep)


def assert_whole(generation: Generation) -> None:
    """It holds exactly the state of its step."""
    expected = state_of(generation.step)
    for stem, tensors in expected.items():
        loaded = generation.tensors(stem)
        assert loaded.keys() == tensors.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert generation.document("state") == {"step": generation.step, "alpha": [0.01 / 3, generation.step / 7]}


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked process (torch is loaded already); its exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        _work_and_leave(work)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _work_and_leave(work: Callable[[], object]) -> NoReturn:
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


SYSCALLS = ("write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


def interposed(before: Callable[[str, tuple], None]) -> dict[str, Callable]:
    """The system calls that change a disk, each with `before(name, arguments)` in front of it."""
    return {name: _with(before, name, getattr(os, name)) for name in SYSCALLS}


def _with(before: Callable[[str, tuple], None], name: str, real: Callable) -> Callable:
    def call(*args: object, **kwargs: object) -> object:
        before(name, args)
        return real(*args, **kwargs)

    return call
