"""Replay: every target is what the plan says, and finished shards are not made again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from skymoe.base.dtype import DType
from skymoe.base.errors import FormatError, MachineError
from skymoe.convert.apply import Read, make_common
from skymoe.convert.parents import Parent, open_parent
from skymoe.convert.plan import ConversionPlan, Copy, Operation, Source, Step, Target, Zeros, plan_of
from skymoe.convert.replay import replay
from skymoe.weights.reader import WeightsReader

SHARD_BYTES = 30_000


@dataclass(frozen=True)
class Halves(Operation):
    """The two halves of a matrix: two results."""

    source: Source

    @property
    def sources(self) -> tuple[Source, ...]:
        return (self.source,)


class Maker:
    """Performs the operations and counts what it was asked for."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def __call__(self, operation: Operation, read: Read) -> tuple[torch.Tensor, ...]:
        def counted(source: Source) -> torch.Tensor:
            self.read.append(source.name)
            return read(source)

        if isinstance(operation, Halves):
            return counted(operation.source).t().chunk(2, dim=1)  # not contiguous, as results may be
        return make_common(operation, counted)


@pytest.fixture
def parent(oracle, tmp_path: Path) -> Iterator[Parent]:
    with open_parent(oracle.make(tmp_path / "dense", "llama")) as parent:
        yield parent


def plan_for(parent: Parent) -> ConversionPlan:
    """Every tensor three times, as it is, halved in bf16 and cut; and one tensor of zeros."""
    steps, order = [], []
    for name, source in parent.by_parameter().items():
        same = [Target(f"{name}.{i}", source.dtype, source.shape) for i in range(2)]
        narrow = Target(f"{name}.scaled", DType.BFLOAT16, source.shape)
        steps += [Step(Copy(source), tuple(same)), Step(Copy(source, 0.5), (narrow,))]
        order += [target.name for target in (*same, narrow)]
        if len(source.shape) == 2 and source.shape[0] % 2 == 0:
            rows, columns = source.shape
            cut = [Target(f"{name}.cut{i}", source.dtype, (columns, rows // 2), slot=i) for i in (1, 0)]
            steps.append(Step(Halves(source), tuple(cut)))
            order += [target.name for target in cut]
    steps.append(Step(Zeros(), (Target("z", DType.FLOAT32, (3, 7)), Target("none", DType.FLOAT32, (0, 4)))))
    return plan_of(steps, [*order, "z", "none"])


def write(parent: Parent, directory: Path, make: Maker) -> dict[str, bytes]:
    directory.mkdir(exist_ok=True)
    plan = plan_for(parent)
    files = replay(plan, [parent], directory, make, name="test", max_shard_bytes=SHARD_BYTES)
    assert sorted(path.name for path in directory.iterdir() if path.suffix == ".safetensors") == [f.name for f in files]
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_targets_are_what_the_plan_says(parent: Parent, tmp_path: Path) -> None:
    write(parent, tmp_path / "out", Maker())
    with WeightsReader(tmp_path / "out") as reader:
        assert not reader.tensor("z").any()
        assert reader.tensor("none").shape == (0, 4)
        for name, source in parent.by_parameter().items():
            w = parent.reader.tensor(source.name)
            assert torch.equal(reader.tensor(f"{name}.0"), w)
            assert torch.equal(reader.tensor(f"{name}.1"), w)
            assert torch.equal(reader.tensor(f"{name}.scaled"), (w * 0.5).bfloat16())
            if f"{name}.cut0" in reader.names():
                assert torch.equal(torch.cat([reader.tensor(f"{name}.cut{i}") for i in range(2)], dim=1), w.t())


def test_each_source_is_read_once_per_step(parent: Parent, tmp_path: Path) -> None:
    make = Maker()
    write(parent, tmp_path / "out", make)
    steps = plan_for(parent).steps
    assert make.read == [source.name for step in steps for source in step.operation.sources]


def test_a_finished_shard_is_not_made_again(parent: Parent, tmp_path: Path) -> None:
    """Shards in every state a kill can leave: whole, unfinished, missing; and two that only look whole."""
    out, first = tmp_path / "out", Maker()
    expected = write(parent, out, first)
    shards = sorted(name for name in expected if name.endswith(".safetensors"))
    assert len(shards) > 8
    states = {name: (out / name).stat().st_mtime_ns for name in shards}
    (out / shards[1]).rename(out / f"{shards[1]}.part")
    (out / shards[3]).unlink()
    (out / shards[5]).write_bytes(expected[shards[5]][:-1])
    (out / shards[6]).write_bytes(expected[shards[6]].replace(b".scaled", b".scalex", 1))
    (out / "model.safetensors.index.json").unlink()
    again = Maker()
    assert write(parent, out, again) == expected
    assert 0 < len(again.read) < len(first.read) / 2
    kept = [name for i, name in enumerate(shards) if i not in (1, 3, 5, 6)]
    assert all((out / name).stat().st_mtime_ns == states[name] for name in kept)
    nothing = Maker()
    assert write(parent, out, nothing) == expected
    assert nothing.read == []


def test_an_error_of_a_step_rises_and_files_are_closed(parent: Parent, tmp_path: Path) -> None:
    def broken(operation: Operation, read: Read) -> tuple[torch.Tensor, ...]:
        raise FormatError("the source is damaged")

    (tmp_path / "out").mkdir()
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    with pytest.raises(FormatError, match="damaged"):
        replay(plan_for(parent), [parent], tmp_path / "out", broken, name="test", max_shard_bytes=SHARD_BYTES)
    assert not before or len(os.listdir("/proc/self/fd")) == before


def test_a_failure_in_the_thread_that_pushes_to_the_disk_is_told(
    parent: Parent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(MachineError, match="Input/output error"):
        replay(plan_for(parent), [parent], tmp_path / "out", Maker(), name="test", max_shard_bytes=SHARD_BYTES)
    assert not list((tmp_path / "out").glob("*.safetensors"))  # none took its name
