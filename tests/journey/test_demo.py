"""The main job end to end, through the command line, as a visitor runs it."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import skymoe
from skymoe.demo.config import DemoConfig
from skymoe.demo.recipes import FULL, QUICK


def run_demo(out: Path, *options: str, threads: int = 1) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "skymoe", "demo", "--out", str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    out = tmp_path_factory.mktemp("demo") / "quick"
    return out, run_demo(out, "--quick", "--corpus", "synthetic", "--json")


def test_the_quick_demo_leaves_what_it_promises(quick: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, process = quick
    assert process.returncode == 0, process.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert json.loads(process.stdout) == summary
    assert summary["quick"] is True
    assert {name: (out / name).is_dir() for name in summary["models"]} == dict.fromkeys(
        ("dense", "moe-start", "moe"), True
    )
    assert all(model["bytes_written"] > 1_000_000 for model in summary["models"].values())
    assert 0 < summary["moe_bits_per_byte"] < 8
    assert 0 < summary["dense_bits_per_byte"] < summary["parent_bits_per_byte"]
    assert summary["receipt"]["exact"] is True
    assert summary["receipt"]["max_abs_dlogit"] < 1e-4
    stages = {"corpus", "dense", "upcycle", "moe", "dense-continued", "samples", "report", "total"}
    assert set(summary["seconds"]) == stages


def test_the_models_of_the_demo_load_and_have_learned_the_same_tokens(
    quick: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, _ = quick
    for name, experts in (("dense", None), ("moe", 8)):
        model = skymoe.load(out / name)
        assert (model.spec.moe and model.spec.moe.num_experts) == experts
        assert torch.isfinite(model(torch.arange(12)[None])).all()
    dense, moe = (
        [json.loads(line) for line in (out / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("dense-continue", "moe-train")
    )
    # the same tokens, all that were asked for but the pads at the end of an epoch
    asked = QUICK.further_steps * QUICK.sequences * QUICK.sequence_length
    tokens = [[line["tokens"] for line in lines if line["kind"] == "train"][-1] for lines in (dense, moe)]
    assert 0.99 * asked <= tokens[0] == tokens[1] <= asked
    # step 0: the mixture of experts is its parent, so both runs begin with the same held-out loss
    first = [next(line for line in lines if line["kind"] == "eval")["bits_per_byte"]["all"] for lines in (dense, moe)]
    assert first[0] == pytest.approx(first[1], rel=2e-3)


def test_the_report_is_one_offline_file(quick: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    page = (quick[0] / "report.html").read_text(encoding="utf-8")
    head = html.unescape(page[: page.index("<body")])
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', head)
    assert policy and "default-src 'none'" in policy[1] and "http" not in policy[1]
    assert not re.search(r"<(script|link|img|iframe)\b[^>]*\b(src|href)=", head)  # the body embeds plotly's own source


def test_the_same_command_again_does_no_work_twice(quick: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, _ = quick
    before = {path: path.stat().st_mtime_ns for path in (out / "moe").iterdir()}
    again = run_demo(out, "--quick", "--corpus", "synthetic")
    assert again.returncode == 0, again.stderr
    assert "next:" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in (out / "moe").iterdir()} == before


def test_a_directory_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    process = run_demo(tmp_path, "--quick")
    assert process.returncode == 2
    assert "not empty" in process.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_another_seed_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    config = DemoConfig(out=tmp_path, seed=3)
    (tmp_path / "demo.json").write_text(json.dumps(config.model_dump(mode="json", exclude={"out"})))
    process = run_demo(tmp_path, "--seed", "4")
    assert process.returncode == 2
    assert "other settings" in process.stderr


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_mixture_beats_its_continued_parent(tmp_path: Path, seed: int) -> None:
    """The claim of the demo, on the text of this Python: 5 of 5 seeds."""
    process = run_demo(tmp_path / "demo", "--seed", str(seed), "--json", threads=os.cpu_count() or 1)
    assert process.returncode == 0, process.stderr
    summary = json.loads(process.stdout)
    assert summary["tokens"]["further"] > 0.99 * FULL.further_steps * FULL.sequences * FULL.sequence_length
    assert summary["moe_bits_per_byte"] < summary["dense_bits_per_byte"]
