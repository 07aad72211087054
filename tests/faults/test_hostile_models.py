"""Every hostile model directory against every job that reads models: refused in words, and nothing else happens.

All runs are done once, in one process of bounded memory (`hostile_jobs.main`); the tests look at what it wrote down.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from faults.hostile_jobs import JOBS, jobs_for, may_refuse, must_refuse
from faults.hostile_models import BASES, CASES, place
from faults.hostile_tools import SECRET

from skymoe.cli import main

TESTS = Path(__file__).parents[1]
_HANGING = 900.0  # seconds for all runs together, which take about 20: only to end a process that hangs
_MAX_GROWTH = 96 * 2**20

Answers = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    scratch = tmp_path_factory.mktemp("hostile")
    temporary, out = scratch / "tmp", scratch / "answers.jsonl"
    temporary.mkdir()
    code = "import sys; from pathlib import Path; from faults.hostile_jobs import main; main(*map(Path, sys.argv[1:]))"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
        "TMPDIR": str(temporary),
    }
    command = [sys.executable, "-c", code, str(scratch / "work"), str(out)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_HANGING, check=False)
        problem = done.stderr[-3000:] if done.returncode else ""
    except subprocess.TimeoutExpired:
        problem = "it hangs"
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    assert not problem, f"{problem}\nlast run: {lines[-1:]}"
    assert os.listdir(temporary) == []
    return {(line["case"], line["job"]): line for line in lines if "case" in line}


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 400
    assert len(JOBS) == 9


@pytest.mark.parametrize("name", CASES)
def test_hostile(name: str, answers: Answers) -> None:
    case = CASES[name]
    for job in jobs_for(case.base):
        answer = answers[name, job]
        error, message = answer["error"], answer["message"]
        where = f"{job}: {error}: {message}"
        assert not error or answer["exit_code"] == 2, where  # ours, and the user's to mend
        assert error or not must_refuse(case, job), f"{job} takes it"
        assert not error or may_refuse(case, job), where
        assert message.replace("\n", "").isprintable() and len(message) < 4000, where
        assert not answer["left"] and not answer["leaked"], (job, answer)
        assert not (error and answer["out"]), where
        if must_refuse(case, job):
            assert all(text in message for text in case.says), where
            assert "model" in message.partition(":")[0], where  # the directory, or a file in it


@pytest.mark.parametrize("name", BASES)
def test_the_valid_models_pass(name: str, answers: Answers) -> None:
    """Without this the corpus could be refused for another reason than its malice."""
    jobs = jobs_for(name)
    assert {job: answers[f"valid: {name}", job]["message"] for job in jobs} == dict.fromkeys(jobs, "")


def test_memory_is_bounded(answers: Answers) -> None:
    grown = {key: answer["grown"] for key, answer in answers.items() if answer["grown"] > 2**20}
    assert sum(grown.values()) < _MAX_GROWTH, grown


CLI = {
    "header: name clears the screen": ["inspect"],
    "header: tensor twice": ["upcycle"],
    "header: ranges overlap": ["export"],
    "config: two billion experts": ["inspect"],
    "config: config 100,000 deep": ["quantize"],
    "config: model_type clears the screen": ["upcycle"],
    "index: shard climbs": ["merge-check"],
    "beside: tokenizer.json a link to a secret": ["export"],
    "beside: a pickle instead of the weights": ["inspect"],
    "beside: nothing there": ["merge-check"],
}


@pytest.mark.parametrize("name", CLI)
def test_command_line(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, one message, no traceback, no control character, no secret."""
    bases = {base: BASES[base](tmp_path / base) for base in {CASES[name].base, "dense"}}
    model = place(bases, CASES[name].base, tmp_path / "case")
    CASES[name].make(model)
    (command,) = CLI[name]
    out = model.parent / "out"
    more = {
        "upcycle": [str(out), "--set", "receipt_tokens=0"], "export": [str(out), "--format", "skymoe"],
        "quantize": [str(out), "--scheme", "channel"], "merge-check": [str(model.parent / "victim")], "inspect": [],
    }  # fmt: skip
    with pytest.raises(SystemExit) as left:
        main([command, str(model), *more[command], "-q"])
    shown = capfd.readouterr()
    assert left.value.code == 2
    assert shown.err.startswith("error: ") and "Traceback" not in shown.err and not shown.out
    assert shown.err.replace("\n", "").isprintable() and SECRET.decode() not in shown.err
    assert not os.path.lexists(out)
