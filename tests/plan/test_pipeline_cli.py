"""`skymoe plan pipeline` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from skymoe.base.errors import ConfigError
from skymoe.cli.plan import app
from skymoe.plan.pipeline.config import read_amounts

FIGURE_6 = ["--forward", "1x24", "--backward", "2", "--microbatches", "48", "--head-forward", "0.666666666"]
FIGURE_6 += ["--head-backward", "1.333333333"]


def answer(*options: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["pipeline", *options, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize(("stages", "split", "period"), [("4", [6] * 4, 20), ("5", [5, 5, 5, 5, 4], 15)])
def test_figure_6(stages: str, split: list[int], period: float) -> None:
    found = answer(*FIGURE_6, "--stages", stages)
    assert found["split"] == split and found["recompute"] == [0] * int(stages)
    assert found["period"] == pytest.approx(period)
    assert found["certificate"]["optimal"] and found["certificate"]["gap"] == 0
    assert found["gain_vs_uniform"] == pytest.approx(0)
    assert found["vocabulary_parallel"]["gain"] == pytest.approx(
        found["makespan"] / found["vocabulary_parallel"]["makespan"] - 1
    )


def test_the_documented_keys() -> None:
    memory = ["--activation", "1", "--checkpoint", "0.1", "--static", "1", "--memory", "20"]
    found = answer(*FIGURE_6, "--stages", "4", *memory)
    keys = {"split", "recompute", "makespan", "bubble_fraction", "period", "memory", "fits"}
    assert keys <= set(found) and keys == set(found["uniform"])
    assert max(found["memory"]) <= 20 and found["fits"]
    assert found["makespan"] < found["uniform"]["makespan"]
    assert found["gain_vs_uniform"] == pytest.approx(found["uniform"]["makespan"] / found["makespan"] - 1)
    busy = sum(found["busy"]) / (4 * found["makespan"])
    assert found["bubble_fraction"] == pytest.approx(1 - busy)
    parallel = answer(*FIGURE_6, "--stages", "4", "--vocabulary-parallel")
    assert parallel["stage_forward"] == pytest.approx([6 + 2 / 12] * 4)


def test_halves_and_schedules() -> None:
    halves = ["--forward", "0.4,0.6x1,0.4,0.6", "--backward", "1", "--halves", "--stages", "3", "--microbatches", "6"]
    assert answer(*halves)["split"] == [2, 1, 1]
    assert answer(*halves, "--whole-layers", "--head-forward", "0.5")["split"] == [2, 2, 0]
    zbv = answer("--forward", "1x8", "--backward", "2", "--weight", "1", "--stages", "2", "--microbatches", "8",
                 "--schedule", "zbv")  # fmt: skip
    assert len(zbv["split"]) == 4 and zbv["chunks"] == 2 and len(zbv["memory"]) == 2


def test_the_table_has_both_divisions_and_the_proof() -> None:
    result = CliRunner().invoke(app, ["pipeline", *FIGURE_6, "--stages", "5", "--draw"], catch_exceptions=False)
    assert result.exit_code == 0
    for words in ("planned", "uniform", "with vocabulary parallelism", "Proven optimal", "F forward"):
        assert words in result.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--forward", "1x24", "--backward", "2", "--stages", "27"], "--stages: 27 stages for 24 units"),
        (["--forward", "1,1", "--backward", "2", "--stages", "4", "--head-forward", "1"], "at most 3 stages"),
        (["--forward", "1x4", "--backward", "2", "--stages", "3", "--halves", "--whole-layers"], "may cut layers"),
        (["--forward", "1e308x4", "--backward", "1", "--stages", "2"], "--forward: input should be less than or equal"),
        (
            ["--forward", "1x4", "--backward", "1", "--stages", "2", "--hop", "1e308"],
            "--hop: input should be less than",
        ),
        (
            ["--forward", "1x4", "--backward", "1", "--stages", "2", "--memory", "1e308"],
            "--memory: input should be less",
        ),
        (["--forward", "1x24", "--backward", "-2", "--stages", "4"], "backward"),
        (["--forward", "1,1", "--backward", "2,2,2", "--stages", "2"], "--backward: 3 values for 2 units"),
        (["--forward", "1x5000", "--backward", "2", "--stages", "2"], "more than 4096 units"),
        (["--forward", "1x", "--backward", "2", "--stages", "2"], "VALUExCOUNT"),
        (["--forward", "one", "--backward", "2", "--stages", "2"], "expected a number"),
        (["--forward", "inf", "--backward", "2", "--stages", "2"], "finite"),
        (
            ["--forward", "1x24", "--backward", "2", "--stages", "4", "--schedule", "gpipe"],
            "--schedule: expected '1f1b'",
        ),
        (["--forward", "1x4", "--backward", "1", "--stages", "2", "--head-forward", "-1"], "--head-forward: input"),
        (["--forward", "1x4", "--backward", "1", "--stages", "2", "--chunks", "2"], "--chunks: 1f1b has 1 stage"),
        (
            ["--forward", "1x24", "--backward", "2", "--stages", "4", "--activation", "1", "--memory", "0.5"],
            "--memory: no division of 24 units over 4 stages fits memory 0.5",
        ),
    ],
)
def test_the_impossible_is_refused_with_a_way_out(options: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["pipeline", *options, "--microbatches", "8"])
    assert isinstance(result.exception, ConfigError) and result.exception.exit_code == 2
    assert said in str(result.exception)


@pytest.mark.parametrize(("name", "told"), [("", "is a directory"), ("nowhere/a.svg", "there is no directory")])
def test_the_output_is_looked_at_first(tmp_path: Path, name: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skymoe.plan.pipeline.run.run", lambda _: pytest.fail("the work must not begin"))
    one = ["--forward", "1x4", "--backward", "2", "--stages", "2", "--microbatches", "8"]
    result = CliRunner().invoke(app, ["pipeline", *one, "--svg", str(tmp_path / name)])
    assert isinstance(result.exception, ConfigError) and told in str(result.exception)
    assert result.exception.where == str(tmp_path / name)


def test_lists() -> None:
    assert read_amounts("1, 2x3 ,1e-1", "x") == [1.0, 2.0, 2.0, 2.0, 0.1]
    with pytest.raises(ConfigError, match="more than 4096"):
        read_amounts("1x4000,2x97", "x")
