"""Why a run ended, told alike on every rank.

When a rank fails, the others learn nothing from their collectives but "connection closed by peer". So whoever fails
leaves its last word in the store first: what it was doing, and why it ends. The first word is the verdict; all others
end with it. A process that was killed can leave no word: the first rank that misses it looks whose heart has stopped,
and leaves the word for it.
"""

from __future__ import annotations

import errno
import json
import time
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist

from skymoe.base.errors import MachineError, SkymoeError, printable
from skymoe.parallel.heartbeat import Beat, Heartbeat, read_beats
from skymoe.parallel.launch import World
from skymoe.parallel.sockets import own_connection

_INTERVALS_OF_SILENCE = 2.5  # after which a rank counts as silent
_VERDICT = "failed/first"
_WORDS_OF_GLOO_AND_NCCL = (
    "gloo/", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "Timed out waiting",
    "recvValue failed", "Socket closed",
)  # fmt: skip


@dataclass(frozen=True)
class Failure:
    """The last word of a rank, or what another found out about it.

    Attributes:
        rank: who failed.
        message: one sentence that names the rank, its phase and the reason.
        told_by: the rank that says so, -1 for the launcher.
    """

    rank: int
    message: str
    told_by: int

    def __str__(self) -> str:
        return self.message


def leave_word(store: dist.Store, failure: Failure) -> Failure:
    """Tell everybody; returns the verdict: this failure, or the one that somebody has told before."""
    text = json.dumps(asdict(failure))
    store.set(f"failed/{failure.rank}", text)
    return _parsed(store.compare_set(_VERDICT, "", text))


def read_verdict(store: dist.Store) -> Failure | None:
    """The first failure that was told; None as long as nobody has failed."""
    return _parsed(store.get(_VERDICT)) if store.check([_VERDICT]) else None


def explain(error: BaseException, world: World, heart: Heartbeat) -> BaseException:
    """What to tell the user about `error`, which ends this rank; leaves word of it for the others.

    An error that only says that another rank is gone becomes a MachineError that names that rank, its phase and the
    reason. Memory or disk that ran out is told with rank and phase. All else is returned as it is: it says what is
    wrong better than we could, and a defect keeps its traceback.
    """
    if world.store is None:
        return error
    own = heart.beat()
    try:
        if is_loss_of_others(error):
            return _of_others(error, world, own)
        verdict = Failure(world.rank, f"{own.who} failed in {own.where}: {_reason(error)}", world.rank)
        leave_word(own_connection(world.store), verdict)
    except (dist.DistError, RuntimeError):  # the store is gone too
        if is_loss_of_others(error):
            return MachineError(f"{own.who} lost the others in {own.where}", why=_reason(error))
    if is_out_of_memory(error) or is_full_disk(error):
        return MachineError(str(verdict), hint=_hint(error))
    return error


def _of_others(error: BaseException, world: World, own: Beat) -> MachineError:
    assert world.store is not None
    verdict = find_culprit(own_connection(world.store), world)
    if verdict is None:
        return MachineError(f"{own.who} lost the others in {own.where}", why=_reason(error))
    # without the rank that says so: from many ranks the same words are shown once
    return MachineError(str(verdict), why=f"met in {own.where}", hint="the same command resumes")


def find_culprit(store: dist.Store, world: World) -> Failure | None:
    """The verdict; if there is none, whoever gives no sign of life; None when all do. Takes 2.5 intervals at most."""
    if verdict := read_verdict(store):
        return verdict
    before = read_beats(store, world)
    deadline = time.monotonic() + silence_s(world)
    while time.monotonic() < deadline:
        time.sleep(0.1)
        if verdict := read_verdict(store):
            return verdict
    silent = silent_ranks(before, read_beats(store, world), world)
    if not silent:
        return None
    first = min(silent, key=lambda beat: beat.wall)
    return leave_word(store, Failure(first.rank, f"{last_seen(first)} (it is dead, stopped or cut off)", world.rank))


def last_seen(beat: Beat) -> str:
    """Of a rank that is silent: for how long, and its last word, which may be a little older than its end."""
    ago = max(time.time() - beat.wall, 0.0)
    return f"{beat.who} gives no sign of life for {ago:.0f} s; it was last in {beat.where}"


def interval_s(world: World) -> float:
    """Seconds in which a rank speaks at least once: many ranks speak less often, the store hears 500 words a second."""
    return max(1.0, world.size / 500)


def pause_s(world: World) -> float:
    """The shortest time between two words of a rank, however often its phase changes; the same 500 words a second."""
    return max(0.1, world.size / 500)


def silence_s(world: World) -> float:
    """How long to look at a rank before it counts as silent."""
    return _INTERVALS_OF_SILENCE * interval_s(world)


def silent_ranks(before: dict[int, Beat], after: dict[int, Beat], world: World) -> list[Beat]:
    """Last words of the ranks that have said nothing between two looks; one that never spoke counts."""
    never = Beat(0, (), 0, "start", False, 0.0, time.time(), 0)
    silent = []
    for rank in range(world.size):
        beat = after.get(rank, never._replace(rank=rank))
        if rank != world.rank and before.get(rank, never).told == beat.told:
            silent.append(beat)
    return silent


def is_loss_of_others(error: BaseException) -> bool:
    """Whether `error` is a collective or the store saying that somebody does not answer."""
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS_OF_GLOO_AND_NCCL)


def is_out_of_memory(error: BaseException) -> bool:
    """Memory of the machine or of the GPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    words = ("can't allocate memory", "not enough memory", "std::bad_alloc", "Cannot allocate memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def is_full_disk(error: BaseException) -> bool:
    """No space, or the quota is used up."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _reason(error: BaseException) -> str:
    if is_out_of_memory(error):
        return f"out of memory ({_first_line(error)})"
    if is_full_disk(error):
        return f"the disk is full ({_first_line(error)})"
    return _first_line(error) if isinstance(error, SkymoeError) else f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return printable(str(error).strip().split("\n")[0], 500)


def _hint(error: BaseException) -> str:
    if is_full_disk(error):
        return "free space and run the same command again: it resumes"
    return "a smaller batch.micro_sequences, recompute=all, or more ranks; the same command resumes"


def _parsed(text: bytes) -> Failure:
    return Failure(**json.loads(text))
