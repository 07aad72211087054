"""The watch: a hang or a dead rank ends the run in bounded time, and is named.

Two threads beside the training thread of every rank, so that neither can be held up by what holds up the other:

    post    talks to the store over a connection of its own: publishes what this rank does, when that changes and every
            second; looks whether somebody has failed; finds out who hangs when it is asked to
    clock   talks to nobody: when the training thread has been in one phase for `timeout_s`, or does not end although
            another rank has failed, it says so and ends the process, with exit code 3

A hang is seen by every rank at about the same time, as all wait for each other. Who is to blame: ranks that give no
sign of life; else, among the ranks of the earliest step, those that do not wait for others; of these the one that has
been longest in its phase.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from skymoe.parallel.failure import (
    Failure,
    explain,
    interval_s,
    last_seen,
    leave_word,
    pause_s,
    read_verdict,
    silence_s,
    silent_ranks,
)  # fmt: skip
from skymoe.parallel.heartbeat import Beat, Heartbeat, publish, read_beats
from skymoe.parallel.launch import World
from skymoe.parallel.sockets import own_connection
from skymoe.spec.layout import Coordinate

EXIT_CODE = 3
_POST_ANSWERS_S = 4.0  # beyond two looks at everybody: how long the clock waits for the post to find out who hangs
_MAY_END_S = 6.0  # how long a training thread may take to end by itself when another rank has failed


@contextmanager
def watching(world: World, *, timeout_s: float, coordinate: Coordinate | None = None) -> Iterator[Heartbeat]:
    """Watch over the block. It calls `phase` of the heartbeat often: at least once in `timeout_s`.

    Args:
        world: of `distributed`. In a world of one nobody is waited for, and nothing is watched.
        timeout_s: the longest that a phase may take.
        coordinate: of this rank, for messages; it may be set later (`heart.coordinate`).

    Raises:
        MachineError: in place of what a collective says when another rank has failed; it names rank, phase and reason.
    """
    heart = Heartbeat(world.rank, coordinate)
    if world.store is None:
        yield heart
        return
    watch = _Watch(world, own_connection(world.store), heart, timeout_s)
    watch.start()
    try:
        yield heart
    except BaseException as error:
        watch.pause()
        told = explain(error, world, heart)
        if told is error:
            raise
        raise told from error
    finally:
        watch.stop()


class _Watch:
    def __init__(self, world: World, store: dist.Store, heart: Heartbeat, timeout_s: float) -> None:
        self.world, self.store, self.heart, self.timeout_s = world, store, heart, timeout_s
        self._ended = threading.Event()
        self._paused = False
        self._hangs = threading.Event()  # from clock to post: find out who
        self._told = threading.Event()  # from post to clock: this is what is to be said
        self._message = ""
        self._verdict: tuple[Failure, float] | None = None  # and when it was read
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._post, self._clock)]

    def start(self) -> None:
        publish(self.store, self.heart.beat())
        for thread in self._threads:
            thread.start()

    def pause(self) -> None:
        """The training thread is about to end with an error of its own: it tells, not the clock. The heart beats on."""
        self._paused = True

    def stop(self) -> None:
        """The block is over; threads that talk to the store must not outlive it."""
        self._ended.set()
        self.heart.changed.set()
        for thread in self._threads:
            thread.join(_MAY_END_S)

    def _post(self) -> None:
        looked = 0.0
        while not self._ended.wait(pause_s(self.world)):
            self.heart.changed.wait(interval_s(self.world))
            self.heart.changed.clear()
            try:
                publish(self.store, self.heart.beat())
                if self._hangs.is_set() and not self._told.is_set():
                    self._message = self._find_who_hangs()
                    self._told.set()
                elif time.monotonic() - looked > interval_s(self.world) and self._verdict is None:
                    looked = time.monotonic()
                    if verdict := read_verdict(self.store):
                        self._verdict = verdict, looked
            except RuntimeError as error:  # nobody to talk to any more
                self._message = f"the store of the run does not answer: {str(error).splitlines()[0]}"
                self._told.set()
                return

    def _clock(self) -> None:
        while not self._ended.wait(0.25):
            if self._paused:
                continue
            if self.heart.seconds > self.timeout_s:
                self._end_of_a_hang()
            elif self._verdict and time.monotonic() - self._verdict[1] > _MAY_END_S:
                self._leave(f"{self._verdict[0]}\n  met in {self.heart.beat().where}")

    def _end_of_a_hang(self) -> None:
        self._hangs.set()
        self.heart.changed.set()
        self._told.wait(_POST_ANSWERS_S + silence_s(self.world))
        own = self.heart.beat()
        self._leave(self._message or f"{own.who} hangs in {own.where} for {own.seconds:.0f} s; no word of the others")

    def _leave(self, message: str) -> None:
        if self._ended.is_set() or self._paused:
            return
        sys.stderr.write(f"error: {message}\n")
        sys.stderr.flush()
        os._exit(EXIT_CODE)

    def _find_who_hangs(self) -> str:
        """Two looks at everybody, the verdict, and what this rank says about it."""
        before = read_beats(self.store, self.world)
        until = time.monotonic() + silence_s(self.world)
        while time.monotonic() < until:
            publish(self.store, self.heart.beat())
            time.sleep(0.25)
        beats = read_beats(self.store, self.world)
        silent = silent_ranks(before, beats, self.world)
        culprit = blame(list(beats.values()), silent)
        symptom = (
            last_seen(culprit) if culprit in silent else f"{culprit.who} hangs in {culprit.where} for {_age(culprit)} s"
        )
        verdict = leave_word(self.store, Failure(culprit.rank, symptom, self.world.rank))
        living = sorted(beats.keys() - {beat.rank for beat in silent})
        if living and living[0] != self.world.rank:
            return str(verdict)
        return f"{verdict}\n{table(list(beats.values()), silent)}"


def blame(beats: list[Beat], silent: list[Beat]) -> Beat:
    """The rank that all others wait for."""
    if silent:
        return min(silent, key=lambda beat: beat.wall)
    first = min(beat.step for beat in beats)
    behind = [beat for beat in beats if beat.step == first]
    working = [beat for beat in behind if not beat.waits]
    return max(working or behind, key=lambda beat: beat.seconds)


def table(beats: list[Beat], silent: list[Beat]) -> str:
    """A line for every rank."""
    mute = {beat.rank for beat in silent}
    lines = []
    for beat in sorted([*(beat for beat in beats if beat.rank not in mute), *silent]):
        lines.append(f"  {_described(beat, beat.rank in mute)}")
    return "\n".join(lines)


def _described(beat: Beat, is_silent: bool) -> str:
    if is_silent:
        return last_seen(beat)
    return f"{beat.who} {'waits' if beat.waits else 'has been'} in {beat.where} for {_age(beat)} s"


def _age(beat: Beat) -> int:
    """Seconds in its phase until now."""
    return round(beat.seconds + max(time.time() - beat.wall, 0.0))
