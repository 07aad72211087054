"""Real faults for real runs: a forked child that may die, and a hand on the n-th forward pass.

Children are forks of the test process, so torch is imported once. They use one thread: a pool of OpenMP threads does
not survive a fork.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from skymoe.base.errors import SkymoeError
from skymoe.model.block import Block

INTERRUPTED = 130


class Child:
    """A forked process that runs `function` and exits with the number it returns."""

    def __init__(self, function: Callable[[], int]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(_run(function))

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = 300.0) -> int:
        """The exit code; minus the signal's number when a signal ended it. A child that hangs is killed, and fails."""
        deadline = time.monotonic() + timeout
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                self.kill()
                os.waitpid(self.pid, 0)
                raise AssertionError(f"the child did not end within {timeout} s")
            time.sleep(0.005)


def _run(function: Callable[[], int]) -> int:
    torch.set_num_threads(1)
    try:
        return function()
    except SkymoeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BaseException:
        traceback.print_exc()
        return 70


def wait_for(condition: Callable[[], bool], timeout: float = 300.0) -> None:
    """Until `condition` holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


@contextmanager
def at_forward(number: int, fault: Callable[[Block, torch.Tensor], torch.Tensor | None]) -> Iterator[None]:
    """Call `fault(first block, its output)` at forward pass `number` (from 1); what it returns replaces the output."""
    count = 0

    def hook(module: torch.nn.Module, args: object, output: object) -> object:
        nonlocal count
        if not isinstance(module, Block) or module.attention.layer != 0:
            return None
        count += 1
        if count != number:
            return None
        x_BTD, routing = output
        replaced = fault(module, x_BTD)
        return None if replaced is None else (replaced, routing)

    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class Killer:
    """Signals its own process at the n-th event inside the package: a Python call, or a C call such as fsync or rename.

    Counting events of the main thread under `sys.setprofile` makes "any point of training or of a save" a number.

    Args:
        at: the event before which the signal comes; None only counts.
        within: name of a function; events count only while it is on the stack (or anywhere, if empty).
        number: of the signal.
    """

    def __init__(self, at: int | None, within: str = "", number: int = signal.SIGKILL) -> None:
        self.at, self.within, self.count, self.depth, self.number = at, within, 0, 0, number
        self._package = str(Path(sys.modules["skymoe"].__file__).parent)

    def __enter__(self) -> Killer:
        sys.setprofile(self._event)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)

    def _event(self, frame: object, event: str, argument: object) -> None:
        if event not in ("call", "c_call", "return") or not frame.f_code.co_filename.startswith(self._package):
            return
        if self.within and frame.f_code.co_name == self.within:
            self.depth += {"call": 1, "return": -1}.get(event, 0)
        if event == "return" or (self.within and not self.depth):
            return
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), self.number)
