"""Several ranks on this machine, without torchrun: `skymoe train recipe.yaml --nproc 4`.

The launcher starts the same command N times with torchrun's environment variables, and waits. Why not torchrun: its
store listens on every interface, its ranks outlive a killed agent, and it says "exitcode -9" where a person wants to
know which rank was doing what. Here

    - the store listens on 127.0.0.1, and lives in the launcher: no rank takes it along when it dies or is stopped;
    - rank 0 has the terminal; what other ranks say on standard error is shown with their rank, the same words once;
    - SIGINT and SIGTERM are passed on: ranks save and stop. A second one kills;
    - when a rank dies the others get some seconds to say what they know, then all are ended, and started again as
      often as the user allows; training resumes from its last generation by itself;
    - nobody is left behind, even when the launcher is killed (lifeline.py).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType

import torch.distributed as dist

from skymoe.base.errors import ConfigError
from skymoe.base.log import logger
from skymoe.base.module import module_command
from skymoe.parallel.failure import Failure, leave_word, read_verdict
from skymoe.parallel.heartbeat import named, read_beat
from skymoe.parallel.lifeline import LAUNCHER
from skymoe.parallel.output import Output
from skymoe.parallel.sockets import attempt_of, serve_store

_POLL_S = 0.1
_GRACE_S = 10.0  # for the others to find out what happened, to say it and to leave
_STOPPED = 75  # interrupted, and the same command resumes
_KILLED_TWICE = 130
_MACHINE = 3
_HOPELESS = {1, 2, _STOPPED, _KILLED_TWICE}  # the same command would end the same way, or was asked to end
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def worker_command(*arguments: object) -> list[str]:
    """`skymoe` with `arguments`, by this very interpreter.

    Raises:
        ConfigError: this process is a worker itself.
    """
    if "RANK" in os.environ:
        raise ConfigError("--nproc inside a launcher", where="environment", why="RANK is set", hint="leave --nproc out")
    return module_command("skymoe", *arguments)


def launch(command: Sequence[str], num_ranks: int, *, max_restarts: int = 0) -> int:
    """Run `command` as `num_ranks` ranks of one world and return the exit code.

    Args:
        command: of a worker, which calls `distributed()`.
        num_ranks: how many.
        max_restarts: how often all ranks are started again after one has died.

    Returns:
        0 when all ended well; 75 when they were asked to stop and can be resumed; 130 when they were killed by a second
        signal; else the code of the rank that failed first, 3 if a signal ended it.
    """
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        port = listener.getsockname()[1]
        store = serve_store(listener)
        with _Requests() as requests:
            for restart in range(max_restarts + 1):
                code = _attempt(command, num_ranks, port, store, requests, restart, max_restarts)
                if code == 0 or code in _HOPELESS or restart == max_restarts or requests.count:
                    return code
                logger.warning("starting all %d ranks again (%d of %d)", num_ranks, restart + 1, max_restarts)
    raise AssertionError("the last attempt returns")


class _Requests:
    """Signals that ask the launcher to stop, counted while the block lasts (in the main thread)."""

    def __init__(self) -> None:
        self.count = 0
        self.last = signal.SIGTERM

    def __enter__(self) -> _Requests:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.last = signal.Signals(number)


@dataclass
class _Workers:
    """The processes of one attempt, by rank."""

    processes: list[subprocess.Popen[bytes]]
    codes: dict[int, int] = field(default_factory=dict)  # of those that have ended, in the order of their end

    def look(self) -> list[int]:
        """Ranks that have ended since the last look."""
        ended = [r for r, p in enumerate(self.processes) if r not in self.codes and p.poll() is not None]
        for rank in ended:
            self.codes[rank] = self.processes[rank].returncode
        return ended

    def send(self, number: int, *, also_ended: bool = False) -> None:
        """Signal every rank with all that it has started."""
        for rank, process in enumerate(self.processes):
            if also_ended or rank not in self.codes:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, number)

    @property
    def all_ended(self) -> bool:
        return len(self.codes) == len(self.processes)


def _attempt(
    command: Sequence[str],
    num_ranks: int,
    port: int,
    store: dist.Store,
    requests: _Requests,
    restart: int,
    max_restarts: int,
) -> int:
    output = Output()
    before = attempt_of(store)
    with _started(command, num_ranks, port, restart, max_restarts, output) as workers:
        passed_on, deadline = 0, float("inf")
        while not workers.all_ended:
            output.show(_POLL_S)
            if requests.count > passed_on:
                passed_on = requests.count
                workers.send(requests.last if passed_on == 1 else signal.SIGKILL)
            for rank in workers.look():
                code = workers.codes[rank]
                if code == 0 or (code == _STOPPED and requests.count) or deadline < float("inf"):
                    continue
                deadline = time.monotonic() + _GRACE_S
                _tell_the_others(store, before, rank, code)
            if time.monotonic() > deadline or (deadline < float("inf") and _is_alone(workers, store, before)):
                workers.send(signal.SIGKILL)
        output.finish()
    return _exit_code(workers.codes, store, before, requests)


@contextmanager
def _started(
    command: Sequence[str], num_ranks: int, port: int, restart: int, max_restarts: int, output: Output
) -> Iterator[_Workers]:
    """Start all ranks; at the end of the block nothing of them is left."""
    workers = _Workers([])
    try:
        for rank in range(num_ranks):
            environment = _environment(rank, num_ranks, port, restart, max_restarts)
            worker = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=None if rank == 0 else subprocess.PIPE,
                stderr=None if rank == 0 else subprocess.STDOUT,
                process_group=0,
            )
            workers.processes.append(worker)
            if worker.stdout is not None:
                output.add(rank, worker.stdout)
        yield workers
    finally:
        workers.look()
        workers.send(signal.SIGKILL, also_ended=True)
        for process in workers.processes:
            process.wait()
        output.finish()


def _environment(rank: int, num_ranks: int, port: int, restart: int, max_restarts: int) -> dict[str, str]:
    """What torchrun would set, and a fair share of the cores."""
    threads = max(_num_cores() // num_ranks, 1)
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": str(restart),
        "TORCHELASTIC_MAX_RESTARTS": str(max_restarts),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        LAUNCHER: str(os.getpid()),
    }


def _tell_the_others(store: dist.Store, before: str, rank: int, code: int) -> None:
    """A process that was killed has left no word: leave it for it."""
    attempt = attempt_of(store)
    if code >= 0 or attempt == before:  # it has spoken, or there is nobody to speak to yet
        return
    words = dist.PrefixStore(f"attempt/{attempt}", store)
    beat = read_beat(words, rank)
    last = f"{beat.who} {_ended(code)}; it was last in {beat.where}" if beat else f"{named(rank, None)} {_ended(code)}"
    leave_word(words, Failure(rank, last, -1))


def _failure(store: dist.Store, before: str) -> Failure | None:
    """What the ranks of this attempt have found out."""
    attempt = attempt_of(store)
    return None if attempt == before else read_verdict(dist.PrefixStore(f"attempt/{attempt}", store))


def _is_alone(workers: _Workers, store: dist.Store, before: str) -> bool:
    """Whether the only rank that is left is the one all others gave up: it has nothing to say."""
    left = set(range(len(workers.processes))) - workers.codes.keys()
    failure = _failure(store, before)
    return failure is not None and failure.told_by != failure.rank and left == {failure.rank}


def _exit_code(codes: dict[int, int], store: dist.Store, before: str, requests: _Requests) -> int:
    """The exit code of an attempt; says who failed first."""
    failed = {rank: code for rank, code in codes.items() if code != 0}
    if not failed:
        return 0
    asked = {_STOPPED, _KILLED_TWICE, -signal.SIGINT, -signal.SIGTERM}
    if requests.count > 1:
        return _KILLED_TWICE
    if requests.count and set(failed.values()) <= asked:
        return _STOPPED
    failure = _failure(store, before)
    first = failure.rank if failure and failure.rank in failed else next(iter(failed))
    if len(set(codes.values())) == 1 and failed[first] not in (_MACHINE, -signal.SIGKILL):
        pass  # all refused the same thing, and rank 0 has said why
    elif failure is not None:
        logger.error("%s", failure)
    else:
        logger.error("rank %d %s", first, _ended(failed[first]))
    return failed[first] if failed[first] > 0 else _MACHINE


def _ended(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform.startswith("linux") else os.cpu_count() or 1
