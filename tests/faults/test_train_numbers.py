"""NaN and spikes: the weights are never contaminated, and what happens instead is what the recipe says."""

from __future__ import annotations

import math
import shutil
from contextlib import ExitStack

import pytest
import torch
from faults.faulty import at_forward
from train.tiny import assert_same_state, recipe

from skymoe.base.errors import TrainingError
from skymoe.ckpt.config import DiffConfig
from skymoe.ckpt.run import run_diff
from skymoe.parallel.heartbeat import Heartbeat
from skymoe.parallel.launch import World
from skymoe.train.loop import train
from skymoe.train.metrics import read_metrics
from skymoe.train.run import run
from skymoe.train.settings import run_directory, torch_settings
from skymoe.train.signals import StopRequest
from skymoe.train.start import start
from skymoe.weights.generation import latest_generation

STEPS = {
    "steps": 10, "batch": {"micro_sequences": None}, "evaluate": {"every": 0, "at_start": False}, "log": {"every": 1},
    "schedule": {"kind": "constant"},
}  # fmt: skip
BAD_STEP = 7  # the forward pass of this number; there is one per step


def nan_activation(block, x_BTD):
    return x_BTD * math.nan


def nan_weight(block, x_BTD) -> None:
    block.ffn_norm.weight.data[3] = math.nan  # the weight itself, behind autograd's back


def spike(block, x_BTD):
    """What the layer says has nothing to do with its input: the loss of a model that has learnt nothing."""
    return torch.randn(x_BTD.shape, generator=torch.Generator().manual_seed(0)) * 3 + x_BTD * 0


def events(directory, name: str) -> list[dict]:
    return [line for line in read_metrics(directory / "metrics.jsonl") if line.get("event") == name]


def tensors_of(directory, stem: str, step: int) -> dict:
    return latest_generation(directory / "checkpoints", max_step=step).tensors(stem)


def assert_finite(directory) -> None:
    for stem in ("model", "optimizer"):
        assert all(
            tensor.isfinite().all() for tensor in latest_generation(directory / "checkpoints").tensors(stem).values()
        )


def test_skip_leaves_every_tensor_as_it_was(tmp_path):
    config = recipe(tmp_path, **STEPS, checkpoint={"every": 1, "keep": 20})
    with at_forward(BAD_STEP, nan_activation):
        report = run(config)
    assert (report.step, report.skipped, report.exit_code) == (10, 1, 0)
    (event,) = events(config.run.dir, "skip")
    assert event["step"] == BAD_STEP and "not finite" in event["detail"]["reason"]
    before, after = (config.run.dir / f"checkpoints/step-{step:08}" for step in (BAD_STEP - 1, BAD_STEP))
    differences = run_diff(DiffConfig(left=before, right=after)).differences
    names = {difference.name.partition(":")[2].partition("[")[0] for difference in differences}
    assert names == {"counters.step", "counters.next_sample", "guard.consecutive", "guard.skipped"}
    assert_finite(config.run.dir)


def test_skip_is_the_run_without_that_batch(tmp_path):
    config = recipe(tmp_path, **STEPS)
    with at_forward(BAD_STEP, nan_activation):
        run(config)
    other = recipe(tmp_path, **STEPS, run={"dir": str(tmp_path / "other")})
    _train_until(other, BAD_STEP - 1, pass_over=1)
    assert_equal_tensors(config.run.dir, other.run.dir)


def test_rollback_is_the_run_that_passes_over_the_batches_since_the_generation(tmp_path):
    config = recipe(tmp_path, **STEPS, guard={"non_finite": "rollback"})
    with at_forward(BAD_STEP, nan_activation):
        report = run(config)
    assert (report.step, report.skipped) == (10, 1)
    (event,) = events(config.run.dir, "rollback")
    assert event["step"] == 4 and event["detail"]["from_step"] == BAD_STEP
    steps = [line["step"] for line in read_metrics(config.run.dir / "metrics.jsonl") if line["kind"] == "train"]
    assert steps == list(range(1, 11)), "no step is told twice"
    other = recipe(tmp_path, **STEPS, run={"dir": str(tmp_path / "other")})
    _train_until(other, 4, pass_over=3, renumber=False)
    assert_equal_tensors(config.run.dir, other.run.dir)


def test_rollback_heals_a_weight_that_became_nan(tmp_path):
    config = recipe(tmp_path, **STEPS, guard={"non_finite": "rollback"})
    with at_forward(BAD_STEP, nan_weight):
        report = run(config)
    assert (report.step, report.exit_code) == (10, 0)
    assert_finite(config.run.dir)


def test_rollback_before_the_first_save_returns_to_the_start(tmp_path):
    config = recipe(tmp_path, **STEPS, guard={"non_finite": "rollback"})
    with at_forward(2, nan_weight):
        run(config)
    assert events(config.run.dir, "rollback")[0]["step"] == 0
    assert_finite(config.run.dir)


def test_skipping_cannot_mend_a_nan_weight_and_says_so(tmp_path):
    config = recipe(tmp_path, **STEPS, guard={"non_finite": "skip", "max_consecutive": 2})
    with (
        at_forward(BAD_STEP, nan_weight),
        pytest.raises(TrainingError, match=r"step 9: not finite.*max_consecutive") as caught,
    ):
        run(config)
    assert caught.value.exit_code == 1
    assert_finite(config.run.dir)


def test_raise_stops_and_the_same_command_goes_on_from_the_last_generation(tmp_path):
    config = recipe(tmp_path, **STEPS, guard={"non_finite": "raise"})
    with at_forward(BAD_STEP, nan_activation), pytest.raises(TrainingError, match="step 7: not finite"):
        run(config)
    assert events(config.run.dir, "stop")[0]["step"] == BAD_STEP
    assert run(config).resumed_from == 4
    run(recipe(tmp_path, **STEPS, guard={"non_finite": "raise"}, run={"dir": str(tmp_path / "straight")}))
    assert_same_state(config.run.dir, tmp_path / "straight")


@pytest.mark.parametrize("action", ["skip", "rollback", "raise", "ignore"])
def test_a_loss_spike_takes_the_action_of_the_recipe(tmp_path, action):
    guard = {"spike": action, "spike_window": 4, "spike_sigma": 1.0}
    config = recipe(tmp_path, **STEPS, guard=guard)
    with at_forward(BAD_STEP, spike):
        if action == "raise":
            with pytest.raises(TrainingError, match="spike: loss"):
                run(config)
            return
        report = run(config)
    assert report.step == 10
    steps = [event["detail"].get("from_step", event["step"]) for event in events(config.run.dir, action)]
    assert (BAD_STEP in steps) == (action != "ignore")


def test_a_rolled_back_run_that_is_killed_ends_the_same(tmp_path):
    """The choice to pass over data is not lost: the resumed run meets the same batch and decides the same."""
    config = recipe(tmp_path, **STEPS, guard={"non_finite": "rollback"})
    with at_forward(BAD_STEP, nan_activation):
        run(config)
    other = recipe(tmp_path, **STEPS, guard={"non_finite": "rollback"}, run={"dir": str(tmp_path / "other")})
    with at_forward(BAD_STEP, nan_activation):
        run(other.replace(steps=6))
        # the counter of the hook goes on: step 7 is forward 7 of this process
        shutil.rmtree(other.run.dir / "checkpoints/step-00000006")
        (other.run.dir / "checkpoints/LATEST").unlink()
    with at_forward(BAD_STEP - 4, nan_activation):
        run(other)
    assert_same_state(config.run.dir, other.run.dir)


def _train_until(config, step: int, *, pass_over: int, renumber: bool = True) -> None:
    """Steps up to `step`, then the rest of the run as if the next `pass_over` batches did not exist."""
    with run_directory(config.run.dir), torch_settings(config) as device:
        alone = World(0, 1, 0, device, None, False)
        job = start(config.replace(steps=step), alone, Heartbeat())
        train(job, StopRequest())
        job.metrics.close()
        job = start(config, alone, Heartbeat())
        counters = job.state.counters
        counters.next_sample += pass_over * config.batch.sequences
        counters.step += pass_over * renumber
        train(job, StopRequest())
        job.metrics.close()


def assert_equal_tensors(left, right) -> None:
    report = run_diff(DiffConfig(left=left, right=right))
    assert [one for one in report.differences if not one.name.startswith("state.json:guard.")] == []


def test_a_generation_never_holds_what_is_not_finite(tmp_path):
    """A weight breaks in the last step, where no later loss would show it."""
    config = recipe(tmp_path, **STEPS)

    def infinite_unused_row(block, x_BTD) -> None:
        block.moe.router.weight.data[0, 0] = math.inf

    with at_forward(10, infinite_unused_row), pytest.raises(TrainingError, match=r"layers\.0\.moe\.router\.weight"):
        run(config)
    assert latest_generation(config.run.dir / "checkpoints").step == 8
    assert run(config).resumed_from == 8


@pytest.mark.parametrize("every", [4, 1000])
def test_rollbacks_that_lead_nowhere_end(tmp_path, every):
    """NaN comes back before the next save is reached: each rollback counts, also where saving is due at step 0."""
    guard = {"non_finite": "rollback", "max_consecutive": 3}
    config = recipe(tmp_path, **STEPS, checkpoint={"every": every}, guard=guard)
    with ExitStack() as stack, pytest.raises(TrainingError, match="max_consecutive"):
        for number in range(3, 60, 3):
            stack.enter_context(at_forward(number, nan_activation))
        run(config)
    assert len(events(config.run.dir, "rollback")) == 3
    assert len(events(config.run.dir, "save")) == 1, "the generation of step 0 is not saved again"
    assert_finite(config.run.dir)
