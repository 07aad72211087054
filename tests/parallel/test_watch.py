"""Heartbeats, who is to blame for a hang, what a lost connection means, and who is slow."""

from __future__ import annotations

import errno
import os
import threading
import time

import pytest
import torch
import torch.distributed as dist
from parallel.launched import launched_toy
from parallel.ranks import run_ranks

from skymoe.base.errors import ConfigError, MachineError
from skymoe.parallel.failure import (
    Failure,
    explain,
    find_culprit,
    is_loss_of_others,
    leave_word,
    read_verdict,
    silent_ranks,
)  # fmt: skip
from skymoe.parallel.heartbeat import Beat, Heartbeat, publish, read_beat, read_beats
from skymoe.parallel.launch import World
from skymoe.parallel.mesh import build_mesh, single_mesh
from skymoe.parallel.sockets import host_store
from skymoe.parallel.stragglers import RankTime, StepTimes, stragglers
from skymoe.parallel.watch import blame, table, watching
from skymoe.spec.layout import Coordinate, Layout
from skymoe.spec.split import Split


def beat(rank: int, step: int, phase: str, seconds: float, *, waits: bool = False, wall: float = 0.0) -> Beat:
    return Beat(rank, (rank, 0, 0), step, phase, waits, seconds, wall or time.time(), 5)


def world_of(rank: int, size: int) -> World:
    return World(rank, size, rank, torch.device("cpu"), host_store(), False)


def test_a_heartbeat_tells_phase_step_and_age_and_counts_busy_time():
    heart = Heartbeat(3, Coordinate(1, 0, 1))
    heart.phase("forward, micro-batch 2", 17)
    time.sleep(0.03)
    heart.phase("reduce", 17, waits=True)
    time.sleep(0.05)
    told = heart.beat()
    assert (told.who, told.where) == ("rank 3 (pp 1, dp 0, tp 1)", '"reduce" of step 17')
    assert told.waits and 0.05 <= told.seconds < 5
    heart.phase("update", 17)
    busy = heart.busy()
    assert set(busy) == {"start", "forward, micro-batch 2"}
    assert busy["forward, micro-batch 2"] >= 0.03
    assert heart.busy() == {}
    assert heart.beat().told == told.told + 1


def test_beats_pass_through_the_store():
    world = world_of(0, 3)
    assert read_beats(world.store, world) == {} and read_beat(world.store, 1) is None
    told = [beat(0, 4, "forward", 1.5), beat(2, 4, 'a "quoted" phase', 0.0, waits=True)]
    for one in told:
        publish(world.store, one)
    assert read_beats(world.store, world) == {0: told[0], 2: told[1]}
    assert read_beat(world.store, 2) == told[1]


def test_blame():
    """Silence first, then the earliest step, then who does not wait, then who has been longest at it."""
    beats = [
        beat(0, 7, "forward", 60),
        beat(1, 6, "reduce", 63, waits=True),
        beat(2, 6, "read", 61),
        beat(3, 6, "x", 62),
    ]
    assert blame(beats, []).rank == 3
    assert blame(beats[:3], []).rank == 2
    assert blame(beats[:2], []).rank == 1
    silent = [beat(0, 9, "save", 1, wall=time.time() - 30), beat(2, 9, "save", 1, wall=time.time() - 40)]
    assert blame(beats, silent).rank == 2
    lines = table(beats, silent).splitlines()
    assert [line.split()[1] for line in lines] == ["0", "1", "2", "3"]
    assert "gives no sign of life for 40 s; it was last in" in lines[2]
    assert lines[1].endswith('rank 1 (pp 1, dp 0, tp 0) waits in "reduce" of step 6 for 63 s')


def test_the_silent_are_those_whose_count_stands_still():
    world = world_of(0, 4)
    before = {rank: beat(rank, 1, "forward", 1) for rank in (0, 1, 2)}
    after = {0: before[0], 1: before[1]._replace(told=6), 2: before[2]}
    assert [one.rank for one in silent_ranks(before, after, world)] == [2, 3]  # not itself; one that never spoke


def test_the_first_word_is_the_verdict():
    store = host_store()
    assert read_verdict(store) is None
    first, second = Failure(2, "rank 2: first", 2), Failure(1, "rank 1: second", 0)
    assert leave_word(store, first) == first
    assert leave_word(store, second) == first == read_verdict(store)


class Pulse:
    """Ranks that live, beside the one under test."""

    def __init__(self, world: World, ranks: list[int]) -> None:
        self._ended = threading.Event()
        self._store = world.store.clone()
        self._hearts = [Heartbeat(rank) for rank in ranks]
        self._thread = threading.Thread(target=self._beat)

    def _beat(self) -> None:
        while not self._ended.wait(0.2):
            for heart in self._hearts:
                publish(self._store, heart.beat())

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()


def test_a_lost_connection_is_told_as_the_rank_that_is_gone():
    world = world_of(0, 3)
    gone = Heartbeat(2, Coordinate(0, 1, 0))
    gone.phase("backward", 12)
    publish(world.store, gone.beat())
    lost = RuntimeError("[/src/gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]:1")
    heart = Heartbeat(0)
    heart.phase("reduce", 12)
    with Pulse(world, [1]):
        told = explain(lost, world, heart)
    assert isinstance(told, MachineError)
    assert "rank 2 (pp 0, dp 1, tp 0) gives no sign of life" in str(told)
    assert 'it was last in "backward" of step 12' in str(told) and 'met in "reduce" of step 12' in str(told)
    assert read_verdict(world.store).rank == 2
    other = World(1, 3, 1, world.device, world.store, False)
    assert str(explain(lost, other, heart)) == str(told)  # everybody tells the same


def test_when_all_live_nobody_is_accused():
    world = world_of(0, 2)
    with Pulse(world, [1]):
        assert find_culprit(world.store, world) is None
        told = explain(
            RuntimeError("Timed out waiting 1000ms for recv operation to complete (gloo/)"), world, Heartbeat()
        )
    assert "rank 0 lost the others" in str(told)


@pytest.mark.parametrize(
    "error, words",
    [
        (MemoryError(), "out of memory"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"),
            "out of memory",
        ),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors"), "the disk is full"),
    ],
)
def test_what_the_machine_refuses_names_rank_and_phase_and_is_left_for_the_others(error, words):
    world = world_of(1, 2)
    heart = Heartbeat(1, Coordinate(1, 0, 0))
    heart.phase("save", 40)
    told = explain(error, world, heart)
    assert isinstance(told, MachineError)
    assert f'rank 1 (pp 1, dp 0, tp 0) failed in "save" of step 40: {words}' in str(told)
    assert read_verdict(world.store).message in str(told)


def test_other_errors_stay_what_they_are_and_are_left_for_the_others():
    for error in (ConfigError("no such thing"), KeyError("a defect"), KeyboardInterrupt()):
        world = world_of(0, 2)
        assert explain(error, world, Heartbeat()) is error
        assert read_verdict(world.store).rank == 0
        assert not is_loss_of_others(error)
    assert explain(KeyError("alone"), World(0, 1, 0, torch.device("cpu"), None, False), Heartbeat()).args == ("alone",)


def test_a_watched_block_gives_the_error_of_the_rank_that_failed_first():
    world = world_of(0, 2)
    with pytest.raises(MachineError, match="rank 1: its GPU fell off the bus") as caught, watching(world, timeout_s=60):
        leave_word(world.store, Failure(1, "rank 1: its GPU fell off the bus", 1))
        raise RuntimeError("gloo/ Connection reset by peer")
    assert isinstance(caught.value.__cause__, RuntimeError)
    with watching(
        World(0, 1, 0, torch.device("cpu"), None, False), timeout_s=0.01
    ) as heart:  # alone: nothing to wait for
        time.sleep(0.05)
        assert heart.seconds > 0.01


def coordinates(*places: tuple[int, int, int]) -> list[Coordinate]:
    return [Coordinate(*place) for place in places]


def test_stragglers_are_measured_against_their_own_stage():
    places = coordinates((0, 0, 0), (0, 1, 0), (0, 2, 0), (1, 0, 0), (1, 1, 0), (1, 2, 0))
    seconds = [1.0, 1.1, 1.4, 9.0, 9.0, 20.0]
    times = [RankTime(rank, place, s, "forward") for rank, (place, s) in enumerate(zip(places, seconds, strict=True))]
    found = stragglers(times)
    assert [one.rank for one in found] == [5]
    assert (found[0].ratio, found[0].phase) == (pytest.approx(20 / 9), "forward")
    assert [one.rank for one in stragglers(times, slow=1.2)] == [5, 2]
    assert stragglers([RankTime(0, places[0], 5.0)]) == [] == stragglers([])
    assert stragglers([RankTime(rank, places[rank], 0.0) for rank in range(3)]) == []


def exchanged() -> list[tuple[int, tuple[int, ...], float, str]]:
    layout = Layout(pp=1, dp=3, stages=Split((2,)))
    mesh = build_mesh(layout, torch.device("cpu"))
    rank = dist.get_rank()
    busy = [{}, {"forward": 0.25, "backward": 0.5}, {"ü" * 40: 1e-9}][rank]
    return [(t.rank, tuple(t.coordinate), t.seconds, t.phase) for t in StepTimes(mesh).exchange(busy)]


def test_busy_seconds_are_exchanged():
    first, *others = run_ranks(3, exchanged)
    assert first[:2] == [(0, (0, 0, 0), 0.0, ""), (1, (0, 1, 0), 0.75, "backward")]
    assert first[2][:3] == (2, (0, 2, 0), 1e-9) and first[2][3].startswith("üü")
    assert others == [first, first]
    alone = StepTimes(single_mesh(Layout(stages=Split((2,))), torch.device("cpu"))).exchange({"forward": 2.0})
    assert [(t.rank, t.seconds, t.phase) for t in alone] == [(0, 2.0, "forward")]


def test_a_rank_that_hangs_ends_all_and_is_named(tmp_path):
    with launched_toy(2, 9, "sleep", 1, 3, 2, directory=tmp_path) as running:
        assert running.wait() == 3, running.said
    assert 'error: rank 1 hangs in "compute" of step 3 for' in running.said
    assert '  rank 0 waits in "add" of step 3 for' in running.said
