"""The ranks of an engine: rank 0 in this process, the others started from here.

    with open_group(config) as ranks:
        logits_RV = ranks.run(step)

Rank 0 may be the engine's worker or a user's own program (`skymoe.LLM`). The others are fresh processes (`follower.py`)
that are told by a pipe what to load, and by a broadcast what to run. Nothing is pickled, and every socket is on the
loopback interface.

No follower outlives rank 0: it ends when the pipe does, and where the kernel can kill it with its parent, that too. A
follower that dies ends the group: a step that has lost a rank cannot be finished, and the error names it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from math import lcm
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from skymoe.base.errors import MachineError, SkymoeError
from skymoe.base.log import logger
from skymoe.base.module import module_command
from skymoe.engine.assignment import LOST, Assignment, LastWord
from skymoe.engine.config import EngineConfig
from skymoe.engine.division import divide
from skymoe.engine.exchange import Exchange
from skymoe.engine.model_files import end_tokens
from skymoe.engine.runner import Runner, threads_of
from skymoe.engine.step import StepPlan
from skymoe.parallel.failure import is_loss_of_others
from skymoe.parallel.lifeline import LAUNCHER
from skymoe.parallel.sockets import host_store
from skymoe.spec.hf import spec_from_directory
from skymoe.spec.quantization import Fp8Scheme
from skymoe.spec.serving_plan import ServingPlan
from skymoe.weights.decoded import DecodedReader

_POLL_S = 0.05
_LOOK_S = 8.0  # for a killed follower to be gone
_GRACE_S = 0.5  # for a killed one to show up beside one that ended
_LEAVE_S = 5.0  # for followers to end by themselves


class ServingGroup:
    """All ranks, as the engine sees them.

    Attributes:
        spec: the model.
        plan: the division.
        eos_ids: end-of-text tokens.
        num_pages: of the key/value cache, on every rank.
        max_model_len: the most tokens of a request.
        weights, kv_dtype: number formats, such as "fp8" and "bf16".
    """

    def __init__(self, runner: Runner, followers: Followers, exchange: Exchange, eos_ids: tuple[int, ...]) -> None:
        self.eos_ids = eos_ids
        self._runner, self._followers, self._exchange = runner, followers, exchange
        self.spec, self.plan = runner.spec, runner.plan
        self.num_pages, self.max_model_len = runner.num_pages, runner.max_model_len
        self.weights, self.kv_dtype = runner.weights, runner.kv_dtype
        self._ended = False

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the followers, ranks 1, 2, ..."""
        return self._followers.pids

    def run(self, step: StepPlan) -> Tensor:
        """One step on all ranks; fp32 logits (R, V) of the rows that want them, in the order of the step.

        Raises:
            MachineError: a rank is dead or does not answer; the message names it. A group of several ranks has ended
                then, as after any other error in a step: they stand at different places and cannot go on together.
        """
        self.check()
        try:
            self._exchange.send_plan(step.encode())
            logits = self._runner.run(step)
        except BaseException as error:
            told = self._followers.explained(error)
            self._ended = bool(self.pids)
            self._followers.end()
            if told is not None:
                raise told from error
            raise
        assert logits is not None
        return logits

    def expert_tokens(self) -> list[list[int]]:
        """Tokens per expert since the start, one row per MoE layer."""
        return self._runner.expert_tokens()

    def check(self) -> None:
        """To be called now and then while there is nothing to run.

        Raises:
            MachineError: a rank has died; the group has ended.
        """
        if self._ended:
            raise MachineError("the ranks of this engine have ended", hint="start it again")
        if self._followers.look():
            told = self._followers.culprit()
            self._ended = True
            self._followers.end()
            raise told

    def close(self) -> None:
        """End the followers; harmless twice."""
        if not self._ended:
            self._ended = True
            with suppress(RuntimeError):  # one has died since
                self._exchange.send_stop()
            self._followers.end(wait_s=_LEAVE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_group(config: EngineConfig, *, loaded: Callable[[int, int], None] | None = None) -> ServingGroup:
    """Divide the model, start the followers, load; `loaded` is told how many layers rank 0 has read, of how many.

    Raises:
        FormatError, ConfigError: the model or the division cannot be used.
        MachineError: a follower did not start, or memory is short.
    """
    spec = spec_from_directory(config.model)
    eos_ids = end_tokens(config.model, spec)
    is_fp8, block = fp8_of(config.model)
    plan = divide(spec, config, fp8_block=block, weights="fp8" if is_fp8 else None)
    if config.plan is not None and (plan.weights == "fp8") != is_fp8:
        found = "FP8" if is_fp8 else "not"
        logger.warning("%s counts on %s weights, and these are %s", config.plan, plan.weights, found)
    size = plan.num_ranks
    if size > 1 or config.threads is not None:
        torch.set_num_threads(threads_of(config, size))
    store = host_store() if size > 1 else None
    followers = Followers(config, plan, store)
    try:
        runner = Runner(spec, plan, 0, config, loaded=loaded)
        followers.wait_until_ready()
        exchange = Exchange(0, size, store, timeout_s=config.timeout_s, device=runner.device)
        runner.connect(exchange)
    except BaseException as error:
        told = followers.explained(error)
        followers.end()
        if told is not None:
            raise told from error
        raise
    return ServingGroup(runner, followers, exchange, eos_ids)


def fp8_of(directory: Path) -> tuple[bool, int | None]:
    """Whether the weights are FP8, and between how many columns and rows at a time they may be cut; None: anywhere."""
    with DecodedReader(directory) as reader:
        sizes = {pair.block_size for pair in reader.scaled.values() if pair.scheme is Fp8Scheme.BLOCK}
        return bool(reader.scaled), lcm(*(side for size in sizes for side in size)) if sizes else None


class Followers:
    """The processes of ranks 1, 2, ...; started here, and ended by `end`.

    Args:
        config, plan: of the engine.
        store: where the ranks meet; None for an engine of one rank, which has no followers.
    """

    def __init__(self, config: EngineConfig, plan: ServingPlan, store: dist.TCPStore | None) -> None:
        self._store = store
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        try:
            for rank in range(1, plan.num_ranks):
                assert store is not None
                task = Assignment(rank=rank, size=plan.num_ranks, port=store.port, config=config, plan=plan)
                self._processes[rank] = _started(task)
        except BaseException:
            self.end()
            raise

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids, by rank."""
        return tuple(process.pid for process in self._processes.values())

    def look(self) -> bool:
        """Whether one has ended."""
        return any(process.poll() is not None for process in self._processes.values())

    def wait_until_ready(self) -> None:
        """Until all have loaded their share.

        Raises:
            SkymoeError: one could not.
        """
        waiting = set(self._processes)
        while waiting:
            assert self._store is not None
            if self.look():
                raise self.culprit()
            waiting = {rank for rank in waiting if not self._store.check([f"ready/{rank}"])}
            time.sleep(_POLL_S if waiting else 0)
        if self._store is not None:
            self._store.set("go", "1")

    def explained(self, error: BaseException) -> SkymoeError | None:
        """What to tell the user where `error` only says that another rank is gone; None where it says it all."""
        return self.culprit() if self._processes and is_loss_of_others(error) else None

    def culprit(self) -> SkymoeError:
        """Who ended first, and why, as far as can be found out.

        A process that was killed is gone only when it has run once more, which takes seconds on a machine with much to
        do; those that it left behind may end before it. So who was killed comes before who only ended.
        """
        begin = time.monotonic()
        while (waited := time.monotonic() - begin) < _LOOK_S:
            self.look()
            ended = {rank: p.returncode for rank, p in self._processes.items() if p.returncode not in (None, LOST)}
            for rank in sorted(ended, key=lambda rank: ended[rank] > 0):
                if ended[rank] < 0 or waited > _GRACE_S:
                    return self._obituary(rank, ended[rank])
            stopped = [self._named(rank) for rank, process in self._processes.items() if _is_stopped(process.pid)]
            if stopped:
                told = f"{', '.join(stopped)} is stopped and does not answer"
                return MachineError(told, hint="kill -CONT, or start again")
            time.sleep(_POLL_S)
        lost = [self._named(rank) for rank, process in self._processes.items() if process.returncode == LOST]
        told = f"{', '.join(lost)} lost the others" if lost else "the ranks lost each other"
        return MachineError(told, why="one did not answer in time", hint="raise timeout_s if a step may take longer")

    def end(self, *, wait_s: float = 0.0) -> None:
        """End all, in peace if they do so within `wait_s` seconds; harmless twice."""
        deadline = time.monotonic() + wait_s
        for process in self._processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0))
        for process in self._processes.values():
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()
            if process.stdin is not None:
                with suppress(BrokenPipeError):
                    process.stdin.close()

    def _named(self, rank: int) -> str:
        return f"rank {rank} (pid {self._processes[rank].pid})"

    def _obituary(self, rank: int, code: int) -> SkymoeError:
        key = f"failed/{rank}"
        if self._store is not None and self._store.check([key]):
            return LastWord.model_validate_json(self._store.get(key)).as_error(self._named(rank))
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = "out of memory? more ranks, or a smaller kv_memory_gb" if code == -signal.SIGKILL else ""
        return MachineError(f"rank {rank} (pid {self._processes[rank].pid}, {how}) is gone", hint=hint)


def _started(task: Assignment) -> subprocess.Popen[bytes]:
    """A follower that has been told its task. Its own group: Ctrl-C in a terminal is for rank 0."""
    process = subprocess.Popen(
        module_command("skymoe.engine.follower"), env={**os.environ, **_environment()}, stdin=subprocess.PIPE,
        process_group=0,
    )  # fmt: skip
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it is dead already, which `wait_until_ready` finds out
        process.stdin.write(task.model_dump_json().encode() + b"\n")
        process.stdin.flush()
    return process


def _environment() -> Mapping[str, str]:
    """The kernel's signal at the parent's death comes when the *thread* ends that started the child."""
    own = threading.current_thread() is threading.main_thread()
    return {LAUNCHER: str(os.getpid())} if own else {LAUNCHER: ""}


def _is_stopped(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] in ("T", "t")
