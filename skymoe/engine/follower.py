"""A rank that follows: `python -m skymoe.engine.follower`, started by `engine.group` and by nobody else.

It reads its task from standard input, loads its share, and then runs what rank 0 says, step by step, until that says
stop. It never decides anything. Standard input stays open as long as rank 0 lives; when it ends, so does this process,
however rank 0 died and whatever this one is waiting for.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
from pydantic import ValidationError

from skymoe.base.errors import SkymoeError
from skymoe.engine.assignment import LOST, MAX_LINE, Assignment, last_word
from skymoe.engine.exchange import Exchange
from skymoe.engine.runner import Runner, threads_of
from skymoe.engine.step import StepPlan
from skymoe.parallel.failure import is_loss_of_others
from skymoe.parallel.lifeline import die_with_launcher
from skymoe.spec.hf import spec_from_directory

_FOREVER = timedelta(days=3650)
_ORPHANED = 3


def main() -> int:
    """Follow until the end; the exit code."""
    die_with_launcher()
    line = sys.stdin.buffer.readline(MAX_LINE)
    if not line:
        return _ORPHANED
    try:
        task = Assignment.model_validate_json(line)
    except ValidationError:
        sys.stderr.write("skymoe.engine.follower is started by an engine, not by hand\n")
        return 2
    threading.Thread(target=_end_with_rank_0, daemon=True).start()
    store = dist.TCPStore("127.0.0.1", task.port, None, False, wait_for_workers=False)
    try:
        _follow(task, store)
    except BaseException as error:
        return _told(error, store, task.rank)
    return 0


def _follow(task: Assignment, store: dist.Store) -> None:
    torch.set_num_threads(threads_of(task.config, task.size))
    runner = Runner(spec_from_directory(task.config.model), task.plan, task.rank, task.config)
    store.set(f"ready/{task.rank}", "1")
    store.wait(["go"], _FOREVER)
    exchange = Exchange(task.rank, task.size, store, timeout_s=task.config.timeout_s, device=runner.device)
    runner.connect(exchange)
    while (row := exchange.hear_plan()) is not None:
        runner.run(StepPlan.decode(row))


def _told(error: BaseException, store: dist.Store, rank: int) -> int:
    """Leave word of what went wrong; the exit code."""
    if is_loss_of_others(error):
        return LOST
    if not isinstance(error, SkymoeError):
        traceback.print_exc()
    try:
        store.set(f"failed/{rank}", last_word(error).model_dump_json())
    except RuntimeError:  # rank 0 is gone, and the store with it
        return LOST
    return error.exit_code if isinstance(error, SkymoeError) else 70


def _end_with_rank_0() -> None:
    """Standard input ends when rank 0 does. Not by the kernel's signal alone: that follows the *thread* of rank 0."""
    while os.read(0, 4096):
        pass
    os._exit(_ORPHANED)


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # nothing is left to do, and connections to ranks that are gone must not hold it up
