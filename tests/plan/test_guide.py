"""The rule, its bounds, the count behind it, and where every figure is from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from skymoe.base.config import check_config
from skymoe.base.errors import ConfigError, FormatError
from skymoe.cli.plan import app
from skymoe.plan.guide import facts
from skymoe.plan.guide.config import GuideConfig
from skymoe.plan.guide.facts import Fact
from skymoe.plan.guide.result import GuideReport, Verdict
from skymoe.plan.guide.run import run, verdict_of
from skymoe.plan.guide.table import show
from skymoe.plan.guide.units import count_words, parse_count
from skymoe.spec.flops import flops_per_token
from skymoe.spec.layout import Layout
from skymoe.spec.plan_file import Plan, write_plan
from skymoe.spec.presets import preset
from skymoe.spec.split import Split


def asked(dense: object = "2T", moe: object = "500B", **more: Any) -> GuideReport:
    return run(check_config(GuideConfig, {"dense_tokens": dense, "moe_tokens": moe, **more}))


@pytest.mark.parametrize(
    ("written", "number"),
    [("2T", 2e12), ("500B", 5e11), ("1.3e12", 1.3e12), ("1.5 m", 1.5e6), ("4096", 4096), ("1,000k", 1e6), (7, 7)],
)
def test_counts(written: object, number: float) -> None:
    assert parse_count(written) == pytest.approx(number)


@pytest.mark.parametrize("written", ["", "T", "-1B", "0", "1e99", "2X", "nan", "inf", True, None, "1e12T", "9" * 200])
def test_what_is_no_count(written: object) -> None:
    with pytest.raises(ValueError):
        parse_count(written)


@given(st.floats(1, 9e15))
@settings(deadline=None)
def test_counts_are_written_as_they_are_read(number: float) -> None:
    assert parse_count(count_words(number)) == pytest.approx(number, rel=1e-3)


def test_the_rule() -> None:
    ratios = {0.01: "upcycle", 0.25: "upcycle", 0.26: "either", 1.99: "either", 2.0: "from_scratch", 9: "from_scratch"}
    assert {ratio: verdict_of(ratio).value for ratio in ratios} == ratios
    assert asked("2T", "100B").verdict is Verdict.UPCYCLE  # 0.05 x 1.7
    assert asked("2T", "2.4T").verdict is Verdict.FROM_SCRATCH  # 1.2 x 1.7 = 2.04
    assert asked("2T", "2.3T").verdict is Verdict.EITHER


def test_compute_is_counted_where_the_model_is_known() -> None:
    report = asked(model="skywork-moe")
    flops = [flops_per_token(preset(name), 8192).total for name in ("skywork-moe", "skywork-13b")]
    assert report.compute.ratio == pytest.approx(flops[0] / flops[1]) == pytest.approx(1.57, abs=0.005)
    assert report.budget_ratio == pytest.approx(0.25 * report.compute.ratio)
    assert report.from_scratch_from_tokens == pytest.approx(2 * 2e12 / report.compute.ratio)
    grown = asked(model="skywork-13b", experts=16, top_k=2, sequence_length=8192)
    assert grown.compute.ratio == report.compute.ratio
    assert grown.compute.active_parameters == report.compute.active_parameters
    assert asked().compute.ratio == 1.7 and asked().compute.moe_flops is None


def test_budget_bounds_are_where_the_verdict_changes() -> None:
    report = asked(model="skywork-moe")
    for bound, (below, above) in {
        report.upcycle_up_to_tokens: (Verdict.UPCYCLE, Verdict.EITHER),
        report.from_scratch_from_tokens: (Verdict.EITHER, Verdict.FROM_SCRATCH),
    }.items():
        assert asked("2T", bound * 0.999, model="skywork-moe").verdict is below
        assert asked("2T", bound * 1.001, model="skywork-moe").verdict is above


def test_cost_by_a_given_rate() -> None:
    cost = asked(model="skywork-moe", tokens_per_s_per_gpu=690, gpus=1536).cost
    assert cost is not None and cost.origin == "given"
    assert cost.gpu_hours == pytest.approx(5e11 / 690 / 3600)
    assert cost.days == pytest.approx(5e11 / 690 / 1536 / 86400)
    assert cost.dense_gpu_hours / cost.gpu_hours == pytest.approx(4 / asked(model="skywork-moe").compute.ratio)
    assert cost.from_scratch_gpu_hours == 2 * cost.dense_gpu_hours


def test_cost_by_an_assumed_share_of_the_peak() -> None:
    cost = asked(model="skywork-moe", gpu="a800-80g").cost
    assert cost is not None and "assumed" in cost.origin and cost.days is None
    assert cost.tokens_per_s_per_gpu == pytest.approx(690, rel=0.02)  # where the assumption is from
    given_share = asked(model="skywork-moe", gpu="h100-80g", mfu=0.4).cost
    assert given_share is not None and "given" in given_share.origin and "40%" in given_share.origin
    assert asked(model="skywork-moe").cost is None


def test_cost_by_a_plan(tmp_path: Path) -> None:
    layout, path = Layout(stages=Split((104,))), tmp_path / "plan.json"
    write_plan(Plan(52, layout, {"tokens_per_s_per_gpu": 512.0}), path)
    cost = asked(layout_from=path).cost
    assert cost is not None and cost.tokens_per_s_per_gpu == 512 and "plan" in cost.origin
    write_plan(Plan(52, layout, {"tokens_per_s_per_gpu": True}), path)
    with pytest.raises(FormatError, match="tokens_per_s_per_gpu"):
        asked(layout_from=path)


def test_learning_rate() -> None:
    assert (asked().learning_rate.low, asked().learning_rate.high_times) == (None, 1.0)
    rate = asked(dense_peak_lr=6e-4).learning_rate
    assert (rate.low, rate.high) == (pytest.approx(3e-4), 6e-4)


def test_method_goes_by_the_budget() -> None:
    assert asked(moe="50B").method is facts.COPY and asked(moe="100B").method is facts.DROP_HELPS


def test_every_statement_has_a_source() -> None:
    said = [value for value in vars(facts).values() if isinstance(value, Fact)]
    said += [fact for value in vars(facts).values() if isinstance(value, tuple) and not isinstance(value, Fact)
             for fact in value]  # fmt: skip
    assert len(said) > 20 and all(fact.says and len(fact.source) > 10 for fact in said)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"dense": "much"}, "no count"),
        ({"moe": "0"}, "greater than 0"),
        ({"experts": 8}, "give model"),
        ({"model": "skywork-13b"}, "how many experts"),
        ({"model": "skywork-moe", "experts": 8}, "has experts already"),
        ({"model": "skywork-13b", "experts": 2, "top_k": 3}, "more than"),
        ({"model": "skywork-mo"}, "skywork-moe"),
        ({"gpu": "a800-80g"}, "what does a token cost"),
        ({"gpu": "a900", "model": "skywork-moe"}, "a900"),
        ({"mfu": 0.3}, "mfu needs"),
        ({"tokens_per_s_per_gpu": 1.0, "layout_from": "plan.json"}, "two answers"),
    ],
)
def test_refusals(options: dict[str, Any], told: str) -> None:
    with pytest.raises((ConfigError, FormatError), match=told):
        asked(**options)


@pytest.mark.parametrize("moe", ["100B", "1T", "9T"])
def test_the_table_says_what_belongs_to_the_verdict(moe: str) -> None:
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    report = asked(moe=moe, model="skywork-moe", gpu="a800-80g", gpus=64, dense_peak_lr=3e-4)
    show(report, console)
    text = console.export_text()
    assert report.summary in text and "GPU hours" in text and "0.00015" in text
    assert ("for training from scratch" in text) == (moe != "100B")
    assert ("constant small rate" in text) == (moe != "9T")


def test_command() -> None:
    result = CliRunner().invoke(app, ["guide", "--dense-tokens", "2T", "--moe-tokens", "500B", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.output)
    assert report["verdict"] == "either" and report["compute"]["ratio"] == 1.7 and report["cost"] is None
    assert set(report["rule"][0]) == {"says", "source"}


def test_no_torch() -> None:
    rooms = "skymoe.plan.guide.run, skymoe.plan.emit.emit, skymoe.plan.memory.model"
    code = f"import sys, {rooms}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
