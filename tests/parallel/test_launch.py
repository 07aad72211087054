"""Worlds: from the environment, in processes of our launcher and of torchrun; signals, restarts, sockets, orphans."""

from __future__ import annotations

import os
import signal
import sys
import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from parallel.launched import (
    TOY,
    end,
    is_alive,
    launched,
    launched_toy,
    listening,
    outside_loopback,
    torchrun,
)  # fmt: skip
from parallel.ranks import run_ranks

from skymoe.base.errors import ConfigError, MachineError
from skymoe.parallel.agree import agree, any_of
from skymoe.parallel.launch import distributed, read_place
from skymoe.parallel.launcher import worker_command
from skymoe.parallel.lifeline import is_first_rank
from skymoe.parallel.mesh import Group
from skymoe.parallel.output import Output
from skymoe.parallel.sockets import attempt_of, host_store, muster, open_store, stay_on_loopback

FULL = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def test_without_a_launcher_nothing_is_touched(monkeypatch):
    for name in FULL:
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    with distributed(5.0) as world:
        assert (world.rank, world.size, world.local_rank, world.store) == (0, 1, 0, None)
        assert not world.is_distributed and not dist.is_initialized()
    assert dict(os.environ) == before


@pytest.mark.parametrize("missing", sorted(FULL))
def test_a_missing_variable_is_named(missing):
    with pytest.raises(ConfigError, match=f"{missing} not set"):
        read_place({name: value for name, value in FULL.items() if name != missing})


@pytest.mark.parametrize(
    "change, words",
    [
        ({"RANK": "4"}, "RANK is '4', not a number below 4"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many'"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK is '1', not a number below 1"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is '70000'"),
    ],
)
def test_variables_that_cannot_be_are_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        read_place({**FULL, **change})


def test_place_knows_when_all_ranks_are_here():
    assert not read_place(FULL).is_on_one_machine
    assert not read_place({**FULL, "LOCAL_WORLD_SIZE": "2"}).is_on_one_machine
    assert read_place({**FULL, "LOCAL_WORLD_SIZE": "4"}).is_on_one_machine
    assert read_place({**FULL, "MASTER_ADDR": "127.0.0.1"}).is_on_one_machine
    environment = {"GLOO_SOCKET_IFNAME": "eth1"}
    stay_on_loopback(environment)
    assert environment["GLOO_SOCKET_IFNAME"] == "eth1" and environment["NCCL_SOCKET_IFNAME"].startswith("lo")
    assert is_first_rank({}) and is_first_rank({"RANK": "0"}) and not is_first_rank({"RANK": "10"})


@pytest.mark.parametrize("device, words", [("cuda:1", "is one GPU"), ("meta", "not on meta"), ("cuda", "no GPU")])
def test_a_device_that_does_not_fit_is_refused_before_anything_is_opened(monkeypatch, device, words):
    if device == "cuda":
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in FULL.items():
        monkeypatch.setenv(name, value)
    with pytest.raises((ConfigError, MachineError), match=words), distributed(0.1, device=device):
        pass


def test_a_store_that_does_not_answer_is_named():
    port = host_store().port  # free again: the store is gone
    with pytest.raises(MachineError, match=f"127.0.0.1:{port}, cannot be reached"):
        open_store("127.0.0.1", port, hosts=False, timeout_s=0.5)


def gather(size: int, port: int, *, timeout_s: float = 20.0) -> list[str]:
    """All ranks of an attempt, as threads: their prefixes."""
    attempts: dict[int, str] = {}

    def join(rank: int) -> None:
        store = dist.TCPStore("127.0.0.1", port, None, False, timeout=timedelta(seconds=timeout_s))
        part = muster(store, rank, size, timeout_s=timeout_s)
        attempts[rank] = attempt_of(store)
        part.set(f"here/{rank}", "yes")
        part.wait([f"here/{other}" for other in range(size)])  # all in the same part

    threads = [threading.Thread(target=join, args=(rank,)) for rank in reversed(range(size))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [attempts[rank] for rank in range(size)]


def test_ranks_meet_in_a_part_of_the_store_that_no_attempt_had_before():
    store = host_store()
    seen = []
    for size in (3, 3, 2, 5):
        attempts = gather(size, store.port)
        assert len(set(attempts)) == 1
        seen.append(attempts[0])
    assert len(set(seen)) == 4


def test_muster_names_who_did_not_come():
    with pytest.raises(MachineError, match="rank 1, 2 did not come"):
        muster(host_store(), 0, 3, timeout_s=0.3)
    store = host_store()
    store.set("muster/1", "the word of a rank that is dead")
    with pytest.raises(MachineError, match="rank 1 did not come"):  # it does not answer
        muster(store, 0, 2, timeout_s=0.3)
    with pytest.raises(MachineError, match="did not come together"):
        muster(host_store(), 1, 2, timeout_s=0.3)


def decisions() -> list[object]:
    rank = dist.get_rank()
    world = Group((0, 1, 2), rank, dist.group.WORLD)
    part = dist.new_group([1, 2])
    long = "ä" * 3000
    answers: list[object] = [
        any_of(False, world),
        any_of(rank == 2, world),
        agree(True, "unused", world),
        agree(rank == 0, f"disk of rank {rank} is full: ö", world),
        len(agree(rank != 2, long, world) or "") > 900,
    ]
    if rank:
        answers.append(agree(rank != 2, "of a part", Group((1, 2), rank - 1, part)))
    return answers


def test_all_ranks_hear_the_same_decision():
    first, *others = run_ranks(3, decisions)
    assert first == [False, True, None, "disk of rank 1 is full: ö", True]
    assert others == [[*first, "of a part"]] * 2
    alone = Group((0,), 0, None)
    assert (any_of(True, alone), agree(False, "why", alone), agree(True, "why", alone)) == (True, "why", None)


def test_output_is_shown_with_its_rank_and_the_same_words_once(capfd):
    output = Output()
    for rank, words in ((1, "error: no\n  why: so\n"), (2, "error: no\n  why: so\n"), (3, "other\nbroken \udcff")):
        read, write = os.pipe()
        os.write(write, words.encode(errors="surrogateescape"))
        os.close(write)
        output.add(rank, os.fdopen(read, "rb"))
    output.finish()
    lines = capfd.readouterr().err.splitlines()
    assert sorted(lines)[-2:] == ["rank 3: broken \ufffd", "rank 3: other"]
    assert [line.partition(": ")[2] for line in lines if "rank 3" not in line] == ["error: no", "  why: so"]


@needs_proc
def test_sockets_listen_on_loopback_only_and_a_signal_lets_all_ranks_stop_by_themselves(tmp_path):
    with launched_toy(2, 100_000, directory=tmp_path, TOY_SLOW="0.05") as running:
        running.wait_for(lambda: "step 2" in running.said)
        addresses = listening(running.tree())
        assert len(addresses) >= 3, "the store, and gloo of two ranks"
        assert outside_loopback(addresses) == []
        ranks = running.ranks()
        assert sorted(ranks) == [0, 1]
        running.process.send_signal(signal.SIGTERM)
        assert running.wait() == 75, running.said
        assert not any(is_alive(pid) for pid in ranks.values())


@pytest.mark.slow
@needs_proc
def test_a_second_signal_kills(tmp_path):
    with launched_toy(2, 5, "sleep", 1, 2, directory=tmp_path, TOY_SLOW="0") as running:
        running.wait_for(lambda: "step 1" in running.said)
        running.process.send_signal(signal.SIGINT)
        with pytest.raises(AssertionError, match="did not end"):  # one rank sleeps, the other waits for it
            running.wait(1.0)
        running.process.send_signal(signal.SIGINT)
        assert running.wait() == 130


@needs_proc
def test_ranks_die_with_a_launcher_that_is_killed(tmp_path):
    with launched_toy(2, 100_000, directory=tmp_path, TOY_SLOW="0.05") as running:
        running.wait_for(lambda: "step 1" in running.said)
        ranks = list(running.ranks().values())
        assert len(ranks) == 2
        running.process.kill()
        assert running.wait() == -signal.SIGKILL
        wait = threading.Event()
        for _ in range(200):
            if not any(map(is_alive, ranks)):
                break
            wait.wait(0.05)
        survivors = [pid for pid in ranks if is_alive(pid)]
        for pid in survivors:
            end(pid)
        assert survivors == []


def test_a_rank_that_dies_once_is_started_again_with_all_others(tmp_path):
    with launched_toy(2, 4, "once", 1, 2, directory=tmp_path, restarts=1) as running:
        assert running.wait() == 0, running.said
        assert "rank 1 was killed by SIGKILL" in running.said
        assert "starting all 2 ranks again (1 of 1)" in running.said
        assert running.said.endswith("total 16.0\n")


@pytest.mark.slow
def test_torchrun_restarts_and_the_ranks_meet_again(tmp_path):
    """torchrun keeps its store over a restart, with the addresses of the dead ranks in it."""
    command = torchrun("--nproc-per-node", 2, "--max-restarts", 1, TOY, 4, "once", 1, 2)
    with launched(command, tmp_path) as running:
        assert running.wait() == 0, running.said
        assert running.said.endswith("total 16.0\n")


def test_a_worker_starts_no_workers(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="--nproc"):
        worker_command("train", "recipe.yaml")
    monkeypatch.delenv("RANK")
    assert worker_command("train", "recipe.yaml")[1:] == ["-m", "skymoe", "train", "recipe.yaml"]
