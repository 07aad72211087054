"""What `skymoe plan train` refuses, and what it says: flags by name, hints that do when they are followed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from plan.test_train_profile import profile
from typer.testing import CliRunner

from skymoe.base.config import check_config
from skymoe.base.errors import ConfigError
from skymoe.cli import app
from skymoe.plan.hardware.fitted import gpu_from_profile, measured_on
from skymoe.plan.hardware.profile import Profile
from skymoe.plan.train.asked import read_asked
from skymoe.plan.train.config import PlanTrainConfig
from skymoe.plan.train.files import check_files
from skymoe.plan.train.run import run

QUICK: dict[str, Any] = {
    "model": "mixtral-8x7b", "gpus": 16, "gpu": "h100-80g", "pp": 4, "tp": 4, "seq": 4096, "schedule": "1f1b",
    "micro_batch": 1, "global_batch_tokens": 2**17,
}  # fmt: skip


def asked(**options: Any) -> PlanTrainConfig:
    return check_config(PlanTrainConfig, {**QUICK, **options})


def refused(**options: Any) -> ConfigError:
    with pytest.raises(ConfigError) as told:
        run(asked(**options))
    return told.value


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--gpus", "-4"], "--gpus: input should be greater"),
        (["--gpus", "16", "--micro-batch", "0"], "--micro-batch: input should be greater"),
        (["--gpus", "16", "--schedule", "gpipe"], "--schedule: expected '1f1b'"),
    ],
)
def test_errors_name_the_flag_that_was_typed(flags: list[str], told: str) -> None:
    result = CliRunner().invoke(app, ["plan", "train", "--model", "skywork-moe", *flags])
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception).startswith(told)


def test_200_pipeline_ranks() -> None:
    """More than the 104 halves of the model; the number that is named can be planned."""
    given: dict[str, Any] = {"model": "skywork-moe", "gpus": 400, "gpu": "a800-80g", "tp": 4, "seq": 8192, "top": 1}
    told = refused(**given, pp=200)
    assert (told.where, told.hint) == ("--pp", "--pp 100")
    report = run(asked(**given, pp=100, global_batch_tokens=128 * 8192))
    assert report.layout.pp == 100 and report.best.fits


@pytest.mark.parametrize(("tokens", "near"), [(4096 * 7 + 1, 4096 * 8), (4096 * 6 - 1, 4096 * 4), (100, 4096 * 4)])
def test_tokens_of_a_step_are_rounded_to_whole_shares(tokens: int, near: int) -> None:
    """To the nearest multiple of sequences times replicas (4) times micro-batches; never to none."""
    told = refused(pp=None, tp=None, dp=4, global_batch_tokens=tokens)
    assert told.hint == f"--global-batch-tokens {near}"
    assert read_asked(asked(pp=None, tp=None, dp=4, global_batch_tokens=near)).sequences == near // 4096


def test_a_step_that_no_layout_shares_names_one_that_does() -> None:
    """Eight ranks of a node for a tensor are at most: 64 GPUs in 4 stages are two replicas or more."""
    given: dict[str, Any] = {"gpus": 64, "tp": None, "dp": None, "micro_batch": None}
    told = refused(**given, global_batch_tokens=5 * 4096)
    tokens = int(re.findall(r"--global-batch-tokens (\d+)", told.hint)[0])
    assert tokens == 8 * 4096  # 1F1B wants as many micro-batches as ranks
    assert run(asked(**given, global_batch_tokens=tokens)).best.fits


def test_nodes_that_no_tensor_parallel_group_fits() -> None:
    told = refused(gpus=48, nodes_of=7, pp=12, tp=4)
    assert told.hint == "--tp 1, or --nodes-of 8"
    for change in ({"tp": 1, "nodes_of": 7}, {"tp": 4, "nodes_of": 8}):
        assert read_asked(asked(gpus=48, pp=12, **change)).cluster.gpus_per_node == change["nodes_of"]


def test_memory_that_no_gpu_has_is_not_advised() -> None:
    """Skywork-MoE on 8 GPUs needs 334 GB on each; on 64, 46 GB, which there are."""
    few = refused(model="skywork-moe", gpus=8, gpu="rtx4090", pp=None, tp=None, global_batch_tokens=None)
    assert "--memory" not in few.hint and few.hint.startswith("--gpus ")
    more = refused(model="skywork-moe", gpus=64, gpu="rtx4090", pp=None, tp=8, global_batch_tokens=None)
    name = re.findall(r"--gpu (\S+)", more.hint)[0]
    memory = float(re.findall(r"--memory ([\d.]+)", more.hint)[0])
    given: dict[str, Any] = {"model": "skywork-moe", "gpus": 64, "pp": None, "tp": 8, "global_batch_tokens": None}
    assert run(asked(**given, gpu=name)).best.fits
    assert run(asked(**given, gpu="rtx4090", memory=memory)).best.fits


def test_the_solver_is_quoted_where_memory_is_not_the_reason() -> None:
    """A step of 2^33 tokens has more passes than are simulated; a step that is named can be planned."""
    told = refused(global_batch_tokens=2**36)
    assert "micro-batches" in told.what and "memory" not in str(told)
    tokens = int(told.hint.split()[1])
    assert run(asked(global_batch_tokens=tokens)).best.fits


@pytest.mark.parametrize("flag", ["save", "html", "out"])
def test_paths_are_looked_at_before_the_search(flag: str, tmp_path: Path) -> None:
    lost = tmp_path / "no" / "there"
    with pytest.raises(ConfigError, match="there is no directory"):
        check_files(asked(**{flag: str(lost)}))
    taken = tmp_path / "taken"
    taken.mkdir() if flag != "out" else taken.write_text("")
    with pytest.raises(ConfigError, match="it is a"):
        check_files(asked(**{flag: str(taken)}))
    check_files(asked(**{flag: str(tmp_path / "new")}))
    assert not lost.parent.exists()


def test_a_plan_file_without_words_is_refused_before_the_search(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no word for moe_act"):
        check_files(asked(save=str(tmp_path / "plan.json"), recompute="moe_act"))


def measured(tmp_path: Path, **machine: Any) -> Path:
    path, data = tmp_path / "profile.json", profile(layer_s=0.01, head_s=0.02)
    data["machine"] |= machine
    path.write_text(json.dumps(data))
    return path


def test_a_profile_of_another_machine_is_refused(tmp_path: Path) -> None:
    path = str(measured(tmp_path))
    with pytest.raises(ConfigError, match="which is no h100-80g") as told:
        read_asked(asked(profile=path))
    assert told.value.hint == "--gpu cpu, or leave --profile out"
    assert read_asked(asked(profile=path, gpu="cpu")).cluster.gpu.name == "cpu (measured)"
    assert read_asked(asked(profile=path, gpu=None)).cluster.gpu.name == "cpu (measured)"
    card = str(measured(tmp_path, device="cuda", title="NVIDIA GeForce RTX 4090"))
    assert read_asked(asked(profile=card, gpu=None)).cluster.gpu.name == "rtx4090 (measured)"
    with pytest.raises(ConfigError, match="which is no cpu"):
        read_asked(asked(profile=card, gpu="cpu"))
    unknown = str(measured(tmp_path, device="cuda", title="a card of tomorrow"))
    assert read_asked(asked(profile=unknown)).cluster.gpu.name == "h100-80g (measured)"


def test_the_host_is_no_slower_than_what_was_measured() -> None:
    """The catalogue's 400 us to start a half layer do not hold where a half took 50 us."""
    data = profile(layer_s=1e-4, head_s=1e-4)
    data["machine"] |= {"device": "cuda", "title": "NVIDIA GeForce RTX 4090"}
    fast = Profile.model_validate_json(json.dumps(data))
    assert measured_on(fast) == "rtx4090"
    assert gpu_from_profile(fast).laws.host_s == pytest.approx(5e-5)


def test_the_measured_optimizer_is_in_the_step(tmp_path: Path) -> None:
    """A hundred times slower per parameter: the step is longer by what the rank's parameters then take."""
    given: dict[str, Any] = {
        "model": "demo-dense", "gpus": 2, "gpu": "cpu", "pp": 2, "tp": 1, "seq": 128, "whole_layers": True,
        "global_batch_tokens": 128 * 8,
    }  # fmt: skip
    steps = []
    for update_s in (2e-9, 2e-7):
        data = profile(layer_s=0.01, head_s=0.01) | {"update_s": update_s}
        path = tmp_path / "profile.json"
        path.write_text(json.dumps(data))
        steps.append(run(asked(**given, profile=str(path))))
    quick, slow = (report.time_by_cause_s["update"] for report in steps)
    assert slow == pytest.approx(100 * quick)
    assert steps[1].best.step_time_s - steps[0].best.step_time_s == pytest.approx(slow - quick)
