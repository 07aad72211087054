"""What `skymoe plan serve` writes: the page, and that its place is looked at first."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from skymoe.base.config import check_config
from skymoe.base.errors import ConfigError
from skymoe.cli.plan import app
from skymoe.plan.serve.config import PlanServeConfig
from skymoe.plan.serve.run import run


def plan(model="skywork-moe", gpus="8xrtx4090", weights="fp8", **options):
    return run(check_config(PlanServeConfig, {"model": model, "gpus": gpus, "weights": weights, **options}))


def test_the_page_needs_no_network_and_has_the_rival(tmp_path):
    page = tmp_path / "plan.html"
    report = plan(html=page, batch=(16, 64), compare="llama-3-70b")
    text = page.read_text()
    assert report.rival is not None and f"the tokens per second of {report.rival.model}" in text
    assert "skywork-moe on 8 x rtx4090" in text and "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text and "<script src" not in text


@pytest.mark.parametrize("option", ["html", "save"])
def test_outputs_are_checked_before_the_work(option, tmp_path):
    for path in (tmp_path, tmp_path / "no" / "file"):
        with pytest.raises(ConfigError, match="this path cannot be used"):
            plan(model="no such model", **{option: path})


def test_the_command_writes_the_page(tmp_path):
    page = tmp_path / "plan.html"
    given = ["serve", "--model", "skywork-moe", "--gpus", "8xrtx4090", "--weights", "fp8", "--batch", "8,16"]
    result = CliRunner().invoke(app, [*given, "--html", str(page), "--json"])
    assert result.exit_code == 0 and json.loads(result.output)["fits"]
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gpus", "8xrtx4091"], "--gpus: there is no GPU"),
        (["--gpus", "8xrtx4090", "--engine", "vlm"], "--engine: there is no engine"),
        (["--gpus", "8xrtx4090", "--price", "-1"], "--price: input should be greater than 0"),
        (["--gpus", "8xrtx4090", "--weights", "fp7"], "--weights: expected 'fp32'"),
    ],
)
def test_errors_name_the_flag(options, said):
    refused = CliRunner().invoke(app, ["serve", "--model", "skywork-moe", *options]).exception
    assert isinstance(refused, ConfigError) and said in str(refused)
