"""A process of ours runs our code, whatever lies in the directory where it is started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from skymoe.base.module import module_command


@pytest.mark.parametrize("name", ["skymoe.engine.worker", "skymoe.engine.follower", "skymoe"])
def test_modules_of_the_working_directory_are_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """`cd model; skymoe serve .`: the directory came from strangers."""
    monkeypatch.chdir(tmp_path)
    for stranger in ("argparse", "torch", "typer", "pydantic"):
        Path(f"{stranger}.py").write_text("open('ran', 'w')\nraise SystemExit(99)\n")
    done = subprocess.run([*module_command(name), "--help"], stdin=subprocess.DEVNULL, capture_output=True, timeout=120)
    assert done.returncode in (0, 3), done.stderr  # 3: a follower without a task
    assert not Path("ran").exists()


def test_a_source_tree_that_is_not_installed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    assert module_command("skymoe", 1) == [sys.executable, "-m", "skymoe", "1"]
