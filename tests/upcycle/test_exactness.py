"""The table as code: every row is met, and what it promises is what the receipt measures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from skymoe.convert.parents import open_parent
from skymoe.upcycle.blueprint import draw_blueprint
from skymoe.upcycle.exactness import ROWS, find_row
from skymoe.upcycle.run import run
from tests.upcycle.conftest import config_of

GROUPS = {"method": "virtual_group", "granularity": 4, "expansion": 2}
CASES = {
    "averaged rest": {"method": "specialists", "experts": 4, "rest": "average"},
    "zero routed": {"shared": "zero_routed", "experts": 4, "norm_topk": False},
    "drop": {"method": "drop", "experts": 4},
    "noise": {"method": "noise", "experts": 4},
    "specialists": {"method": "specialists", "assign": [0, 1, 1]},
    "partition": {"method": "partition", "experts": 4, "top_k": 4},
    "clones, router noise": {"method": "duplicate", "router_noise": 0.5},
    "clones, as many times top-k": {"method": "duplicate"},
    "clones, top-k kept": {"method": "duplicate", "experts": 8, "router_noise": 0},
    "virtual groups, he2024": {**GROUPS, "weight_scale": "he2024"},
    "virtual groups, other scale": {**GROUPS, "weight_scale": 3.5},
    "virtual groups, all experts, not renormalized": {**GROUPS, "top_k": 8, "norm_topk": False},
    "virtual groups, top-k cuts a group": {**GROUPS, "top_k": 3},
    "virtual groups, not renormalized": {**GROUPS, "norm_topk": False},
    "virtual groups": GROUPS,
    "copy, renormalized": {"experts": 4, "gate_norm": True},
    "copy, all experts": {"experts": 4, "top_k": 4, "norm_topk": False},
    "copy, not renormalized": {"experts": 4, "norm_topk": False},
}


def sources(options, parents, oracle, tmp_path):
    match options.get("method"):
        case "specialists":
            return [parents("llama"), oracle.make(tmp_path / "other", "llama", initializer_range=0.13)]
        case "duplicate":
            return [parents("mixtral")]
    return [parents("llama")]


def test_the_documentation_has_the_same_rows_and_answers():
    text = (Path(__file__).parents[2] / "docs" / "upcycling.md").read_text("utf-8")
    table = re.findall(r"^\| ([^|]+) \| (no|\*\*yes\*\*) \|", text, flags=re.MULTILINE)
    assert table == [(row.name, "**yes**" if row.exact else "no") for row in ROWS]


def test_every_row_has_a_case():
    assert set(CASES) == {row.name for row in ROWS}
    assert len({row.reason for row in ROWS}) >= len(ROWS) - 1  # a reason of its own, but for one that is shared


@pytest.mark.parametrize("name", CASES)
def test_the_receipt_agrees_with_the_row(name, parents, oracle, tmp_path):
    config = config_of(
        sources(CASES[name], parents, oracle, tmp_path), tmp_path / "moe", receipt_tokens=24, **CASES[name]
    )
    specs = []
    for path in config.sources:
        with open_parent(path) as parent:
            specs.append(parent.spec)
    row = find_row(draw_blueprint(config, specs))
    assert row.name == name
    report = run(config)
    assert (report.exact, report.reason) == (row.exact, row.reason)
    assert (report.max_abs_dlogit < 1e-4) == row.exact


def test_he2024_with_one_shard_is_a_copy(parents, tmp_path):
    options = {"method": "virtual_group", "granularity": 1, "expansion": 4, "weight_scale": "he2024"}
    report = run(config_of(parents("llama"), tmp_path / "moe", receipt_tokens=24, **options))
    assert report.exact
    assert report.max_abs_dlogit < 1e-4


def test_rounded_scales_are_told_as_rounding(parents, oracle, tmp_path):
    import torch

    dense = oracle.make(tmp_path / "dense", "mistral", dtype=torch.bfloat16)
    options = {"method": "virtual_group", "expansion": 2, "receipt_tokens": 24}
    odd = run(config_of(dense, tmp_path / "odd", granularity=3, **options))
    assert not odd.exact
    assert "rounded to a narrower format" in odd.reason
    even = run(config_of(dense, tmp_path / "even", granularity=4, **options))
    assert even.exact  # a power of two only moves the exponent
