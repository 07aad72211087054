"""The command line from outside: what it loads, what it prints where, and how it ends."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

import skymoe
from skymoe import cli
from skymoe.cli.console import plain

if TYPE_CHECKING:
    from conftest import HfOracle

ROOT = Path(__file__).parent.parent


def commands(group: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    yield path, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


TREE = dict(commands(typer.main.get_command(cli.app)))


def run(*arguments: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """`skymoe ARGUMENTS` in a process of its own."""
    import os

    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **env}
    command = [sys.executable, "-m", "skymoe", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def call(*arguments: str) -> int:
    """`skymoe ARGUMENTS` in this process; its exit code."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_the_promised_commands_are_there() -> None:
    promised = ["demo", "train", "upcycle", "generate", "inspect", "report", "doctor"]
    assert {(name,) for name in promised} <= TREE.keys()
    assert {("data", "build"), ("ckpt", "ls"), ("ckpt", "verify"), ("ckpt", "diff")} <= TREE.keys()
    assert {("config", "show"), ("config", "schema")} <= TREE.keys()


@pytest.mark.parametrize("path", TREE, ids=" ".join)
def test_help_imports_no_torch(path: tuple[str, ...]) -> None:
    code = (
        "import sys\nfrom skymoe.cli import main\n"
        f"try: main([*{path!r}, '--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "heavy = {'torch', 'numpy', 'yaml', 'pyarrow', 'plotly', 'tokenizers', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Usage: skymoe" in result.stdout
    assert result.stderr == ""


def test_version() -> None:
    result = run("--version")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"skymoe {skymoe.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["ckpt", "verfy", "x"], "Did you mean 'verify'?"),
        (["--versoin"], "--version"),
        (["upcycle", "a", "b", "--expert", "8"], "--experts"),
        (["upcycle", "a", "b", "--experts", "eight"], "'--experts'"),
        (["train"], "recipe"),
        (["train", "no.yaml"], "no.yaml: cannot read the recipe: No such file"),
        (["config", "show", "no.yaml"], "no.yaml: cannot read the recipe: No such file"),
        (["generate", "m", "text", "--temperature", "-1"], "command line: temperature:"),
        (["generate", "m", "text", "--max-tokens", "0"], "command line: max_tokens:"),
        (["upcycle", "a", "b", "--experts", "0"], "command line: experts:"),
        (["data", "build", "x", "--out", "y", "--set", "vocab_sise=3"], 'did you mean "vocab_size"?'),
        (["report", "no-such-run"], "no-such-run"),
        (["ckpt", "ls", "no-such-run"], "no-such-run"),
    ],
)
def test_bad_input_exits_2_and_says_why(arguments: list[str], told: str, tmp_path: Path) -> None:
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert told in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["inspect {}", "generate {} text", "upcycle {} out", "ckpt verify {}"])
def test_a_missing_model_exits_2(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*command.format("no-such-model").split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "no-such-model" in err
    assert list(tmp_path.iterdir()) == []


def test_a_model_on_its_way(oracle: HfOracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """upcycle, inspect and ckpt on a real directory: data on standard output, exit codes that mean something."""
    dense, moe = str(oracle.make(tmp_path / "dense", "llama")), str(tmp_path / "moe")
    capsys.readouterr()

    def data(*arguments: str, code: int = 0) -> dict[str, Any]:
        assert call(*arguments, "--json", "-q") == code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return json.loads(out)

    options = ["--method", "copy", "--experts", "3", "--top-k", "2", "--set", "receipt_tokens=8"]
    receipt = data("upcycle", dense, moe, *options)
    assert receipt["exact"] is True
    assert receipt["max_abs_dlogit"] < 1e-4
    assert {"kl", "reason"} <= receipt.keys()
    assert (tmp_path / "moe" / "receipt.json").exists()
    assert call("upcycle", dense, moe) == 2
    assert "not empty" in capsys.readouterr().err
    assert data("inspect", moe, "--headers-only")
    assert call("inspect", moe) == 0
    assert "experts" in capsys.readouterr().out
    assert data("ckpt", "verify", moe)["problems"] == []
    assert data("ckpt", "diff", moe, moe)["differences"] == []
    assert data("ckpt", "diff", dense, moe, code=1)["differences"]


def test_a_recipe_with_a_mistake_names_line_key_and_remedy(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: 3\nrun: {dir: r}\ndata:\n  train: [{path: p}]\n  sequence_lenght: 4\nmodel: {path: m}\n")
    result = run("train", str(recipe), "optimizer.lr=fast")
    assert result.returncode == 2
    assert f'{recipe}:5: data.sequence_lenght: unknown key; did you mean "sequence_length"?' in result.stderr
    assert "command line: optimizer.lr: expected a number, got 'fast'" in result.stderr


def test_a_dry_run_prints_the_recipe_in_full_and_does_nothing(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: 3\nrun: {dir: r}\ndata:\n  train: [{path: p}]\nmodel: {path: m}\n")
    dry = run("train", str(recipe), "steps=5", "--dry-run", cwd=tmp_path)
    shown = run("config", "show", str(recipe), "steps=5", cwd=tmp_path)
    assert (dry.returncode, dry.stdout) == (0, shown.stdout)
    recipe.with_name("full.yaml").write_text(dry.stdout)
    again = run("config", "show", "full.yaml", cwd=tmp_path)
    assert again.stdout == dry.stdout
    assert "steps: 5" in again.stdout
    as_json = json.loads(run("config", "show", str(recipe), "--json").stdout)
    assert as_json["steps"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full.yaml", "recipe.yaml"]


@pytest.mark.parametrize("job", ["train", "upcycle", "export", "quantize", "merge-check", "data"])
def test_schema_is_json_schema(job: str) -> None:
    schema = json.loads(run("config", "schema", job).stdout)
    assert schema["additionalProperties"] is False
    assert schema["properties"]


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("doctor", "--json") == 0
    out, err = capsys.readouterr()
    assert err == ""
    data = json.loads(out)
    assert data["dtypes"]["float32 matmul"]
    assert data["packages"]["torch"]
    assert call("doctor") == 0
    assert re.search(r"^dtypes.float32 matmul +yes", capsys.readouterr().out, flags=re.MULTILINE)


def test_colour_only_on_a_terminal() -> None:
    assert "\x1b" not in run("--help").stdout + run("trian").stderr


def test_ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit codes of interruption, of a machine that refuses and of a defect of ours."""
    from skymoe.cli import doctor

    def raising(error: BaseException) -> int:
        def run_() -> None:
            raise error

        monkeypatch.setattr(doctor, "run", run_)
        return call("doctor")

    assert raising(KeyboardInterrupt()) == 130
    assert raising(OSError(28, "No space left on device")) == 3
    assert "No space left" in capsys.readouterr().err
    assert raising(ZeroDivisionError("ours")) == 70
    err = capsys.readouterr().err
    assert "ZeroDivisionError: ours" in err
    assert "defect of skymoe" in err


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = "from skymoe.cli import main; main(['config', 'schema'])"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
    assert err == b""


def documented() -> list[tuple[str, str]]:
    """(place, command line) of every `skymoe ...` line in a code block of README.md and docs/."""
    found = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for block in re.findall(r"```(?:bash|sh|console|)\n(.*?)```", path.read_text("utf-8"), flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if match := re.match(r"(?:\$ )?(?:\.venv/bin/)?skymoe (.*?)(?:\s+#.*|\s+[|>].*)?$", line.strip()):
                    found.append((path.name, match[1]))
    return found


@pytest.mark.parametrize(("place", "line"), documented())
def test_documented_commands_and_options_exist(place: str, line: str) -> None:
    words = line.split()
    path: tuple[str, ...] = ()
    while words and (*path, words[0]) in TREE:
        path = (*path, words.pop(0))
    command = TREE[path]
    parameters = getattr(command, "params", [])
    options = {option for parameter in parameters for option in parameter.opts + parameter.secondary_opts}
    used = {word.split("=")[0] for word in words if word.startswith("--")}
    assert path or used <= {"--help", "--version"}, f"{place}: no such command: skymoe {line}"
    assert used <= options | {"--help"}, f"{place}: skymoe {line}"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.tuples(x) | st.dictionaries(st.text(max_size=3), x, max_size=3),
    max_leaves=8,
)


@given(values)
def test_reports_become_strict_json(value: object) -> None:
    assert json.loads(json.dumps(plain(value), allow_nan=False)) == plain(value)


def test_what_is_not_plain_data_is_refused() -> None:
    with pytest.raises(TypeError, match="plain data"):
        plain({"a": object()})
