"""Predictions beside a sample of published measurements: conventions, splits, gates, the page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from skymoe.base.errors import ConfigError
from skymoe.cli.plan import app
from skymoe.plan.validate.cases import read_cases
from skymoe.plan.validate.config import ValidateConfig
from skymoe.plan.validate.conventions import Convention, convention_of, counted_flops
from skymoe.plan.validate.gains import wrong_signs
from skymoe.plan.validate.layouts import case_layout
from skymoe.plan.validate.levels import case_again
from skymoe.plan.validate.machines import case_cluster, catalogue_name
from skymoe.plan.validate.models import case_model
from skymoe.plan.validate.result import Comparison
from skymoe.plan.validate.run import run
from skymoe.plan.validate.schedules import steady_period
from skymoe.plan.validate.stages import balanced, redistributed
from skymoe.plan.work import Recompute

FILE = Path(__file__).parent / "data" / "cases.json"
CASES = {case.id: case for case in read_cases(FILE)[0]}


@pytest.fixture(scope="module")
def report():
    return run(ValidateConfig(cases=FILE))


def test_the_promises_hold_on_the_sample(report):
    gates = {gate.name: gate for gate in report.gates}
    for name in ("memory, mean error", "step time, dense, fully known layout", "gains with the wrong sign"):
        assert gates[name].holds, (name, gates[name].value)
    assert not report.not_judged
    assert {group.quantity for group in report.groups} >= {
        "step_time",
        "memory",
        "bubble",
        "period",
        "gain",
        "gemm_large",
    }


def test_every_comparison_of_the_sample_is_near(report):
    for comparison in report.comparisons:
        assert abs(comparison.error) < 0.25, comparison


def test_figure_6_has_periods_of_20_and_15():
    assert steady_period([6.0, 6, 6, 8], [12.0] * 4) == pytest.approx(20)
    assert steady_period([5.0, 5, 5, 5, 6], [10.0, 10, 10, 10, 8]) == pytest.approx(15)


@pytest.mark.parametrize(
    "thousand, sizes",
    [
        (32, (4, 4, 4, 4, 4, 4, 4, 4)),
        (64, (4, 4, 4, 4, 4, 4, 5, 3)),
        (128, (4, 4, 4, 4, 4, 5, 5, 2)),
        (256, (4, 4, 4, 5, 5, 5, 5, 0)),
    ],
)
@pytest.mark.parametrize("sequence_length", [2048, 4096])
def test_layers_are_redistributed_as_in_the_authors_runs(thousand, sizes, sequence_length):
    """sail-sg/VocabularyParallelism, artifact/exp_one_host.csv: the layers of the last stage, and FLOPs per stage."""
    shape = case_model(CASES["vocabpar-4B-s2048-v256k-redis"]).shape
    shape = replace(shape, vocab_size=1000 * thousand)
    assert redistributed(shape, 8, sequence_length).sizes == sizes


@pytest.mark.parametrize("sequence_length", [2048, 4096])
def test_the_last_stage_is_as_long_as_the_longest_other_where_that_goes(sequence_length):
    """10B, 16 stages, 128,000 entries: with two layers and a head of 2.2 to 2.4 nearest to 4; with one, it is 3.4."""
    shape = case_model(CASES["vocabpar-4B-s2048-v256k-redis"]).shape
    layer = shape.layers[0]
    attention = replace(layer.attention, num_heads=32, num_kv_heads=32)
    wide = replace(layer, attention=attention, ffn=replace(layer.ffn, inner=16384))
    shape = replace(shape, hidden_size=4096, vocab_size=128_000, layers=(wide,) * 48)
    assert redistributed(shape, 16, sequence_length).sizes == (3,) * 14 + (4, 2)
    assert redistributed(replace(shape, vocab_size=32_000), 16, sequence_length).sizes == (3,) * 16


def test_a_balanced_split_has_the_shortest_longest_stage():
    shape = replace(case_model(CASES["vocabpar-4B-s2048-v256k-redis"]).shape, vocab_size=128_000)
    assert balanced(shape, 8, 2048).sizes == (4, 4, 4, 4, 5, 5, 5, 1)


def test_conventions_differ_as_published():
    """Narayanan et al. 2021: 96 B s l h^2 (1 + s/6h + V/16lh) counts the layers four times and the head three."""
    shape = case_model(CASES["korthikanti-175B-selective-sp"]).shape
    h, layers, s, vocabulary = 12288, 96, 2048, 51200
    formula = 96 * layers * h**2 * (1 + s / (6 * h) + vocabulary / (16 * layers * h))
    assert counted_flops(shape, s, Convention.FULL_AGAIN, again=1.0) == pytest.approx(formula, rel=1e-3)
    assert counted_flops(shape, s, Convention.FULL) > counted_flops(shape, s, Convention.CAUSAL)
    assert convention_of(CASES["korthikanti-175B-selective-sp"]) == (Convention.FULL, True)


def test_words_for_recomputation():
    def level(words, framework="NeMo"):
        case = CASES["korthikanti-22B-selective-sp"]
        return case_again(type(case)(case.id, case.kind, "other", {"recompute": words, "framework": framework}))

    assert level("none").share == 0 and level("full (activations-checkpoint-method uniform)").share == 1
    assert level("selective (attention core)").base is Recompute.SELECTIVE
    assert level("selective moe_act").base is Recompute.MOE_ACT
    assert level("selective per-op", "torchtitan").share == 0.5
    assert not level("see perf recipe of that release").stated and not level(None).stated


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("A100-SXM-80GB 330W", "a100-80g"), ("a100_40gb", "a100-40g"), ("A800-SXM-80GB", "a800-80g"),
        ("H100-96GB HBM2e 500W (Grand Teton)", "h100-96g"), ("h100_80gb", "h100-80g"), ("GB300", "gb300"),
        ("H200-141GB", "h200"), ("RTX 4090 24GB", "rtx4090"), ("H100 PCIe 80GB", "h100-pcie-80g"),
    ],
)  # fmt: skip
def test_spellings_of_gpus(spelling, name):
    assert catalogue_name(spelling) == name


def test_the_network_is_the_cases_own():
    """4 x 100 Gb/s for 8 GPUs: 6.25 GB/s of line rate for each."""
    cluster = case_cluster(CASES["internevo-7b-tp1-zero1=8-128"])
    assert cluster.gpu.network.bandwidth == pytest.approx(0.8 * 6.25e9)


def test_what_is_not_published_is_assumed_and_said():
    case = CASES["mpf-mixtral-8x22b-MCore"]
    layout = case_layout(case, case_cluster(case), is_moe=True)
    assert not layout.known and layout.num_micro == 32 and layout.division.etp == 2
    assert any("recomputation" in words for words in layout.assumed)
    known = CASES["korthikanti-175B-selective-sp"]
    assert case_layout(known, case_cluster(known), is_moe=False).known


def test_wrong_signs_need_both_to_be_clear():
    def gain(predicted, measured):
        return Comparison(case="a", group="g", quantity="gain", unit="x", predicted=predicted, measured=measured)

    assert wrong_signs([gain(1.2, 0.9)]) and not wrong_signs([gain(1.2, 0.995), gain(1.2, 1.1)])


def test_the_command_prints_json_and_writes_the_page(tmp_path):
    page = tmp_path / "page.md"
    arguments = ["validate", "--cases", str(FILE), "--group", "skywork", "--write-docs", str(page), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    content = json.loads(result.stdout)
    assert content["schema"] == "skymoe.plan.validate/1" and content["num_cases"] == 2
    assert {group["quantity"] for group in content["groups"]} == {"period", "bubble"}
    text = page.read_text(encoding="utf-8")
    assert "skywork-fig6-uniform" in text and "<details>" in text


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[]", "there is no case in it"),
        ('[7, {"id": "a", "kind": "gossip", "group": "g"}]', "row 1: not an object; a: cases of the kind 'gossip'"),
        ('[{"id": "a", "kind": "training", "group": "g"}]', "none of 1 cases can be compared"),
        ('[{"id": "a", "kind": "inference", "group": "g"}]', "none of 1 cases can be compared"),
    ],
)
def test_a_file_with_nothing_to_compare_is_refused(tmp_path, content, told):
    path = tmp_path / "cases.json"
    path.write_text(content)
    refused = CliRunner().invoke(app, ["validate", "--cases", str(path)]).exception
    assert isinstance(refused, ConfigError) and refused.exit_code == 2
    assert told in str(refused) and (content == "[]" or "why: " in str(refused))
