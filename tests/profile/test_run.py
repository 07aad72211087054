"""`skymoe plan profile` as a user meets it: a tiny model, a few products, two ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from skymoe.base.errors import FormatError, MachineError
from skymoe.plan.cost.model import prices
from skymoe.plan.hardware.catalogue import find_gpu
from skymoe.plan.hardware.gpu import Cluster, Precision
from skymoe.plan.hardware.profile import LinkKind, Profile, read_profile
from skymoe.plan.memory.model import sizes
from skymoe.plan.shape import shape_of
from skymoe.plan.work import Division, Work
from skymoe.profile.config import ProfileConfig
from skymoe.profile.run import run
from skymoe.spec.hf import config_from_spec
from skymoe.spec.layout import Layout
from skymoe.spec.model import Architecture, ModelSpec, MoESpec
from skymoe.spec.split import Split

SPEC = ModelSpec(
    architecture=Architecture.SKYMOE, vocab_size=256, hidden_size=32, num_layers=4, ffn_size=64, num_heads=2,
    num_kv_heads=2, head_dim=16, max_position=64, moe=MoESpec(num_experts=4, top_k=2, ffn_size=48),
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    (directory / "config.json").write_text(json.dumps(config_from_spec(SPEC)))
    return directory


@pytest.fixture(scope="module")
def measured(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Profile, Path]:
    out = tmp_path_factory.mktemp("out") / "profile.json"
    config = ProfileConfig(model=str(model), out=out, layers=1, tokens=16, repeats=3, gemms=2, ranks=2)
    return run(config), out


def test_the_file_is_what_was_measured(measured: tuple[Profile, Path]) -> None:
    profile, path = measured
    assert read_profile(path) == profile
    assert [entry.name for entry in path.parent.iterdir()] == ["profile.json"]


def test_everything_is_measured(measured: tuple[Profile, Path]) -> None:
    profile, _ = measured
    assert set(profile.links) == set(LinkKind)
    assert all(fit.latency_s > 0 and len(fit.points) > 3 for fit in profile.links.values())
    (kind,) = profile.times.kinds
    assert kind.is_moe
    for piece in (kind.layer, kind.attention, kind.feed_forward):
        assert piece.forward_s > 0 and piece.backward_s > 0
        assert piece.again_backward_s > 0 and 0 < piece.kept_again < piece.kept
    assert kind.attention.kept < kind.layer.kept
    assert profile.times.head.forward_s > 0 and profile.update_s > 0 and profile.stream > 1e8
    assert (profile.machine.ranks, profile.machine.clock, profile.times.model.weights) == (2, "thread", "random")
    assert {(gemm.m, gemm.k, gemm.n) for gemm in profile.gemm[Precision.FP32]} >= {(16, 32, 32), (8, 32, 96)}


def test_the_planner_prices_from_it(measured: tuple[Profile, Path]) -> None:
    """The halves make the measured layer; where tensors are cut the laws stay."""
    profile, _ = measured
    layout = Layout(pp=2, stages=Split((4, 4)))
    work = Work(
        shape=shape_of(SPEC), division=Division.of(layout, weight_bytes=4.0),
        cluster=Cluster(gpu=find_gpu("cpu"), num_gpus=2, gpus_per_node=2), sequence_length=16, micro_batch=1,
        num_micro=4, precision=Precision.FP32,
    )  # fmt: skip
    layer = profile.times.kinds[0].layer
    listed = prices(work, profile)
    attention, ffn = listed.halves[:2]
    assert attention.forward_s + ffn.forward_s == pytest.approx(layer.forward_s)
    assert attention.backward_s + ffn.backward_s == pytest.approx(layer.backward_s)
    assert attention.again_s + ffn.again_s == pytest.approx(layer.again_s)
    assert listed.head.forward_s == profile.times.head.forward_s
    cut = replace(work, division=replace(work.division, tp=2))
    assert prices(cut, profile).halves[0].forward_s != attention.forward_s


def test_kept_bytes_are_what_the_memory_model_says(measured: tuple[Profile, Path]) -> None:
    profile, _ = measured
    work = Work(
        shape=shape_of(SPEC), division=Division(pp=1, dp=1, tp=1, weight_bytes=4.0, optimizer_bytes=8.0),
        cluster=Cluster(gpu=find_gpu("cpu"), num_gpus=1, gpus_per_node=1), sequence_length=16, micro_batch=1,
        num_micro=1, precision=Precision.FP32,
    )  # fmt: skip
    attention, ffn = sizes(work).halves[:2]
    kind = profile.times.kinds[0]
    assert attention.activation == pytest.approx(kind.attention.kept, rel=0.02)
    assert ffn.activation == pytest.approx(kind.feed_forward.kept, rel=0.05)
    assert attention.checkpoint == pytest.approx(kind.attention.kept_again)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"version": 2}, "version"),
        ({"stream": float("1e999")}, "JSON"),
        ({"stream": -1}, "stream"),
        ({"extra": 1}, "extra"),
        ({"times": None}, "times"),
    ],
)
def test_a_file_that_is_none_is_refused(
    measured: tuple[Profile, Path], tmp_path: Path, change: dict[str, object], told: str
) -> None:
    data = json.loads(measured[1].read_text()) | change
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(data))
    with pytest.raises(FormatError, match=told):
        read_profile(path)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "skymoe", "plan", "profile", *map(str, arguments)]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model", "no-such-model", "--out", "p.json"], "presets:"),
        (["--model", "demo-dense", "--out", "nowhere/p.json"], "does not exist"),
        (["--model", "demo-dense", "--out", "p.json", "--ranks", 0], "ranks"),
        (["--model", "demo-dense", "--out", "p.json", "--precision", "fp7"], "precision"),
        (["--model", "demo-dense", "--out", "p.json", "--device", "toaster"], "device"),
    ],
)
def test_bad_input_ends_with_2(arguments: list[object], told: str, tmp_path: Path) -> None:
    done = subprocess.run(command(*arguments), cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2, done.stderr
    assert told in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_model_that_no_machine_holds_is_refused_before_it_is_built(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="need .* GB each"):
        run(ProfileConfig(model="skywork-moe", out=tmp_path / "p.json", layers=52, ranks=64))
    assert not list(tmp_path.iterdir())


def test_interrupted_it_leaves_the_old_file_and_no_process(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    out.write_text("old")
    arguments = command("--model", model, "--out", out, "--repeats", 1000)
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    line = process.stderr.readline()
    assert "profile" in line
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    assert out.read_text() == "old" and [entry.name for entry in tmp_path.iterdir()] == ["profile.json"]
    for _ in range(100):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("a rank is left behind")
