"""Conversions that are killed, interrupted, doubled or out of space: OUT is absent or complete, the next run finishes.

Points of death are counted events (see `Killer`), so that "anywhere" is a number; a few come by the clock instead, to a
real `skymoe upcycle` in a process of its own.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from faults.faulty import INTERRUPTED, Child, Killer, wait_for

from skymoe.base.config import check_config
from skymoe.base.errors import MachineError
from skymoe.upcycle.config import UpcycleConfig
from skymoe.upcycle.run import run

KILLED = -signal.SIGKILL
SHARD_BYTES = 40_000
WEIGHTS = "replay"  # the function that writes them


class Reference(NamedTuple):
    """An undisturbed run: what it wrote, and how many events it has in all, and while weights are written."""

    dense: Path
    content: dict[str, bytes]
    events: int
    events_of_weights: int


@pytest.fixture(scope="module")
def reference(oracle, tmp_path_factory) -> Reference:
    root = tmp_path_factory.mktemp("convert")
    dense = oracle.make(root / "dense", "llama")
    assert Child(lambda: upcycle(dense, root / "moe")).wait() == 0
    found = content(root / "moe")
    assert sum(name.endswith(".safetensors") for name in found) > 20
    counts = [count_events(dense, root / f"counted {within}", within) for within in ("", WEIGHTS)]
    assert content(root / "counted ") == found
    return Reference(dense, found, *counts)


def count_events(dense: Path, out: Path, within: str) -> int:
    def counted() -> int:
        with Killer(None, within) as counter:
            upcycle(dense, out)
        out.with_suffix(".count").write_text(str(counter.count))
        return 0

    assert Child(counted).wait() == 0
    return int(out.with_suffix(".count").read_text())


def config(dense: Path, out: Path) -> UpcycleConfig:
    options = {"experts": 4, "receipt_tokens": 3, "max_shard_bytes": SHARD_BYTES}
    return check_config(UpcycleConfig, {"sources": [str(dense)], "out": str(out), **options})


def upcycle(dense: Path, out: Path) -> int:
    run(config(dense, out))
    return 0


def content(directory: Path) -> dict[str, bytes]:
    """Path below `directory` to bytes; empty when it is not there."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def finished_shards(out: Path) -> dict[str, int]:
    """Names and inodes of the shards that a killed run finished: a file that is written again has another inode."""
    found = (out.parent / f".{out.name}.partial" / "content").glob("*.safetensors")
    return {path.name: path.stat().st_ino for path in found}


def disturb(reference: Reference, out: Path, point: int, number: int, within: str = "") -> dict[str, int]:
    """A run that gets a signal at event `point`; what it leaves is nothing, all, or something to go on from."""

    def disturbed() -> int:
        with Killer(point, within, number):
            return upcycle(reference.dense, out)

    code = Child(disturbed).wait()
    assert code in (KILLED if number == signal.SIGKILL else INTERRUPTED, 0)
    assert content(out) in ({}, reference.content)
    return finished_shards(out)


def kill_midway(reference: Reference, out: Path) -> dict[str, int]:
    """Killed when most of the weights are written; a run that resumes has fewer events, and is killed later."""
    return disturb(reference, out, int(reference.events_of_weights * 0.7), signal.SIGKILL, WEIGHTS)


def check_end(reference: Reference, out: Path, kept: dict[str, int]) -> None:
    """The run after it: bit for bit the undisturbed result, of the very files that were finished."""
    if not out.exists():
        assert Child(lambda: upcycle(reference.dense, out)).wait() == 0
    assert content(out) == reference.content
    assert {name: (out / name).stat().st_ino for name in kept} == kept
    assert {path.name for path in out.parent.iterdir()} - {f".{out.name}.partial"} == {out.name}
    assert content(out.parent / f".{out.name}.partial").keys() <= {"fingerprint"}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("share", [0.7, 0.9])
def test_ended_while_weights_are_written(reference, tmp_path, share, number):
    kept = disturb(reference, tmp_path / "moe", int(reference.events_of_weights * share), number, WEIGHTS)
    assert 0 < len(kept) < sum(name.endswith(".safetensors") for name in reference.content)
    check_end(reference, tmp_path / "moe", kept)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("share", [0.5, 0.98])
def test_ended_while_measuring_or_publishing(reference, tmp_path, share, number):
    kept = disturb(reference, tmp_path / "moe", int(reference.events * share), number)
    assert kept.keys() == {name for name in reference.content if name.endswith(".safetensors")}
    check_end(reference, tmp_path / "moe", kept)


def test_killed_again_and_again(reference, tmp_path):
    first = kill_midway(reference, tmp_path / "moe")
    point = int(reference.events_of_weights * 0.6)
    second = disturb(reference, tmp_path / "moe", point, signal.SIGKILL, WEIGHTS)
    assert first.items() < second.items()
    check_end(reference, tmp_path / "moe", second)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_ended_anywhere(reference, tmp_path, seed):
    """One to three signals, each at a random event."""
    points = random.Random(seed)
    kept: dict[str, int] = {}
    for _ in range(points.randint(1, 3)):
        number = points.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGINT])
        if not (tmp_path / "moe").exists():
            within, most = points.choice([("", reference.events), (WEIGHTS, reference.events_of_weights)])
            kept = disturb(reference, tmp_path / "moe", points.randint(1, most), number, within)
    check_end(reference, tmp_path / "moe", kept)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.9, 0.95, 0.98, 0.99, 0.995, 0.999])
def test_killed_while_publishing(reference, tmp_path, share):
    kept = disturb(reference, tmp_path / "moe", int(reference.events * share), signal.SIGKILL)
    check_end(reference, tmp_path / "moe", kept)


def test_another_conversion_does_not_go_on_from_it(reference, oracle, tmp_path):
    other = oracle.make(tmp_path / "dense", "llama", initializer_range=0.2)
    out = tmp_path / "outs" / "moe"
    assert kill_midway(reference, out)
    upcycle(other, out)
    upcycle(other, tmp_path / "fresh")
    assert content(out) == content(tmp_path / "fresh")
    assert [path.name for path in out.parent.iterdir()] == ["moe"]


def test_a_second_run_is_refused_while_the_first_one_works(reference, tmp_path):
    out = tmp_path / "moe"

    def stops() -> int:
        with Killer(int(reference.events_of_weights * 0.7), WEIGHTS, signal.SIGSTOP):
            return upcycle(reference.dense, out)

    first = Child(stops)
    try:
        os.waitpid(first.pid, os.WUNTRACED)  # until it has stopped
        before = finished_shards(out)
        assert before
        with pytest.raises(MachineError, match="another run is writing"):
            upcycle(reference.dense, out)
        assert finished_shards(out) == before
    finally:
        first.kill(signal.SIGCONT)
        assert first.wait() == 0
    assert content(out) == reference.content


@pytest.mark.parametrize("num_bytes", [100, 8_000, 30_000])
def test_a_write_that_the_kernel_refuses_leaves_nothing(reference, tmp_path, num_bytes):
    """A limit on the size of files stands for a full disk."""

    def limited() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
        try:
            return upcycle(reference.dense, tmp_path / "moe")
        except MachineError as error:  # caught here: what the child prints may be a file, and limited, too
            return 3 if "the system refuses: File too large" in str(error) else 4

    assert Child(limited).wait() == 3
    assert list(tmp_path.iterdir()) == []


def test_the_space_for_the_rest_is_asked_for_before(reference, tmp_path, monkeypatch):
    """A resumed run needs room for what is missing only; without it, it says so before it writes."""
    out = tmp_path / "moe"
    kept = kill_midway(reference, out)
    sizes = {name: len(data) for name, data in reference.content.items() if name.endswith(".safetensors")}
    rest = sum(size for name, size in sizes.items() if name not in kept)
    assert 0 < rest < sum(sizes.values())
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=rest - 1))
    with pytest.raises(MachineError, match="not enough space.*needed.*free"):
        upcycle(reference.dense, tmp_path / "another")
    with pytest.raises(MachineError, match="not enough space"):
        upcycle(reference.dense, out)
    assert finished_shards(out) == kept
    assert not (tmp_path / ".another.partial").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=rest))
    upcycle(reference.dense, out)
    assert content(out) == reference.content


@pytest.fixture(scope="module")
def larger(oracle, tmp_path_factory) -> Iterator[Path]:
    """A dense model whose conversion takes long enough to be hit by the clock."""
    sizes = dict(hidden_size=192, intermediate_size=768, num_hidden_layers=8)
    yield oracle.make(tmp_path_factory.mktemp("larger") / "dense", "llama", **sizes)


def start(dense: Path, out: Path) -> subprocess.Popen[str]:
    options = ["--set", "max_shard_bytes=1000000", "--set", "receipt_tokens=16", "--json"]
    command = [sys.executable, "-m", "skymoe", "upcycle", str(dense), str(out), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_control_c_on_the_command_line_says_how_to_go_on(larger, tmp_path):
    out = tmp_path / "moe"
    first = start(larger, out)
    wait_for(lambda: len(finished_shards(out)) > 3 or first.poll() is not None)
    first.send_signal(signal.SIGINT)
    _, told = first.communicate(timeout=120)
    kept = finished_shards(out)
    assert (first.returncode, out.exists(), len(kept) > 3) == (INTERRUPTED, False, True)
    assert "the same command goes on from here" in told
    second = start(larger, out)
    report, told = second.communicate(timeout=120)
    assert second.returncode == 0
    assert "were written by an earlier run and are kept" in told
    assert json.loads(report)["out"] == str(out)
    assert {name: (out / name).stat().st_ino for name in kept} == kept


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_killed_by_the_clock(larger, tmp_path, seed):
    """From outside and at any machine instruction, also while the thread waits for the disk."""
    whole, out, delays = tmp_path / "whole", tmp_path / "moe", random.Random(seed)
    assert start(larger, whole).wait() == 0
    for _ in range(3):
        process = start(larger, out)
        wait_for(lambda: finished_shards(out) or out.exists() or process.poll() is not None)  # noqa: B023
        time.sleep(delays.uniform(0.0, 1.5))
        process.send_signal(delays.choice([signal.SIGKILL, signal.SIGTERM]))
        process.communicate()
        assert content(out) in ({}, content(whole))
    if not out.exists():
        assert start(larger, out).wait() == 0
    assert content(out) == content(whole)
