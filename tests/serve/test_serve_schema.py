"""The OpenAPI document is true: schemathesis holds the server to it, in all phases, with valid and invalid data.

No filter, no check left out, no status allowed that the document does not name.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from serve.servers import Running, make_model, server

from skymoe.serve.openapi import below

_COMMAND = Path(sys.executable).with_name("schemathesis")
# The context is no part of the document, so it must hold whatever the document allows; the engine ends answers early.
_ENGINE = {"context": 1 << 20, "pages": 1 << 18, "most": 8}


def check_schemathesis(running: Running, examples: int, folder: Path, phases: str) -> str:
    pytest.importorskip("schemathesis")
    command = [
        _COMMAND if _COMMAND.exists() else shutil.which("schemathesis") or "schemathesis",
        "run", f"{running.url}/openapi.json", "--header", f"Authorization: Bearer {running.key}", "--checks", "all",
        "--mode", "all", "--max-examples", str(examples), "--no-color", "--phases", phases,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:] + running.log()[-2000:]
    assert "Operations:       11 selected / 11 total" in done.stdout
    return done.stdout


@pytest.mark.parametrize(
    ("examples", "phases"),
    [
        (3, "examples,fuzzing,stateful"),
        pytest.param(500, "examples,coverage,fuzzing,stateful", marks=[pytest.mark.slow, pytest.mark.nightly]),
    ],
)
def test_schemathesis_all_phases(examples: int, phases: str, tmp_path: Path) -> None:
    with server(make_model(tmp_path / "model"), engine=_ENGINE) as running:
        check_schemathesis(running, examples, tmp_path, phases)
        stats = running.stats()
        assert stats["num_running"] == stats["num_waiting"] == 0 and stats["kv_cache_usage"] == 0
        assert "Traceback" not in running.log()
        assert running.end() == 0


@pytest.mark.parametrize("bound", [1, 2, 9, 10, 11, 100, 101, 257, 1000, 4321])
def test_the_pattern_of_token_keys_takes_the_vocabulary_and_nothing_else(bound: int) -> None:
    pattern = re.compile(f"({below(bound)})")
    taken = {number for number in range(12000) if pattern.fullmatch(str(number))}
    assert taken == set(range(bound))
    assert not any(pattern.fullmatch(text) for text in ("", "00", "01", "-1", "1.0", "1e0", "1\n", "١"))
