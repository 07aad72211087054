from __future__ import annotations

import sys
import types
from typing import Any

import pytest
from train.tiny import recipe

from skymoe.base.errors import MissingExtraError
from skymoe.train.metrics import read_metrics
from skymoe.train.run import run
from skymoe.train.trackers import Trackers, flatten, open_trackers
from skymoe.train.upkeep_config import TrackConfig


class Recorder:
    def __init__(self, fail_at: int | None = None) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.fail_at, self.closed = fail_at, False

    def log(self, step: int, scalars: dict[str, float]) -> None:
        if step == self.fail_at:
            raise ConnectionError("no network")
        self.lines.append((step, scalars))

    def close(self) -> None:
        self.closed = True


def test_nested_figures_become_names():
    value = {"loss": 2.0, "layers": {"alpha": [0.1, 0.2]}, "note": "text", "on": True, "none": None}
    assert flatten(value, "train") == {"train/loss": 2.0, "train/layers/alpha/0": 0.1, "train/layers/alpha/1": 0.2}


def test_the_first_failure_switches_a_tracker_off_and_the_others_go_on(caplog):
    broken, sound = Recorder(fail_at=2), Recorder()
    trackers = Trackers([broken, sound])
    for step in (1, 2, 3):
        trackers.log({"kind": "train", "step": step, "loss": 1.0})
    trackers.log({"kind": "event", "step": 3, "event": "save"})
    trackers.close()
    assert [step for step, _ in broken.lines] == [1]
    assert sound.lines == [(step, {"train/loss": 1.0}) for step in (1, 2, 3)]
    assert (broken.closed, sound.closed) == (False, True)
    assert "Recorder is switched off: no network" in caplog.text


@pytest.mark.parametrize(
    "asked, module", [({"tensorboard": True}, "torch.utils.tensorboard"), ({"wandb": "offline"}, "wandb")]
)
def test_a_missing_package_is_told_before_training(tmp_path, monkeypatch, asked, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"skymoe\[track-(tensorboard|wandb)\]"):
        run(recipe(tmp_path, track=asked))
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_tracker_that_does_not_start_is_left_out(tmp_path, monkeypatch, caplog):
    """A login that fails, a server that is down."""

    def refuse(**options: Any) -> None:
        raise PermissionError("login needed")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refuse))
    report = run(recipe(tmp_path, steps=2, track={"wandb": "online"}))
    assert report.exit_code == 0
    assert "login needed" in caplog.text


def test_wandb_receives_the_lines_of_the_file(tmp_path, monkeypatch):
    recorder, options = Recorder(), {}
    fake_run = types.SimpleNamespace(log=lambda scalars, step: recorder.log(step, scalars), finish=recorder.close)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **o: options.update(o) or fake_run))
    run(recipe(tmp_path, steps=6, track={"wandb": "offline", "project": "p"}))
    lines = [line for line in read_metrics(tmp_path / "run/metrics.jsonl") if line["kind"] in ("train", "eval")]
    assert [step for step, _ in recorder.lines] == [line["step"] for line in lines]
    losses = [scalars["train/loss"] for _, scalars in recorder.lines if "train/loss" in scalars]
    assert losses == [line["loss"] for line in lines if line["kind"] == "train"]
    assert (options["mode"], options["project"], recorder.closed) == ("offline", "p", True)


def test_tensorboard_writes_event_files(tmp_path):
    pytest.importorskip("tensorboard")
    trackers = open_trackers(TrackConfig(tensorboard=True), tmp_path, {}, 0)
    trackers.log({"kind": "train", "step": 1, "loss": 2.5})
    trackers.close()
    assert any((tmp_path / "tensorboard").iterdir())
