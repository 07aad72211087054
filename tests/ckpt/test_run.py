"""`skymoe ckpt ls | verify | diff` on real generations and model directories, and that none of it needs torch."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from skymoe.base.dtype import DType
from skymoe.base.errors import CheckpointError, ConfigError, FormatError
from skymoe.ckpt.config import DiffConfig, LsConfig, VerifyConfig
from skymoe.ckpt.result import DiffReport, LsReport, VerifyReport
from skymoe.ckpt.run import run_diff, run_ls, run_verify
from skymoe.ckpt.table import human_bytes, show
from skymoe.weights.generation import save_generation
from skymoe.weights.writer import ShardedWriter


def save(root: Path, step: int, weight: torch.Tensor | None = None, **state: object) -> Path:
    weight = torch.arange(15.0).reshape(3, 5) + step if weight is None else weight
    tensors = {"model": {"w": weight, "half": weight.bfloat16()}, "optimizer": {"w/exp_avg": weight * 0}}
    document = {"alpha": [0.5, 0.25], "counters": {"step": step, "seconds": os.urandom(2)[0]}, **state}
    return save_generation(root, step, tensors=tensors, documents={"state": document}, layout={})


def write_model(
    directory: Path, tensors: dict[str, torch.Tensor], max_shard_bytes: int = 10**9, **config: object
) -> Path:
    directory.mkdir()
    plan = [(name, DType(str(t.dtype).removeprefix("torch.")), tuple(t.shape)) for name, t in tensors.items()]
    with ShardedWriter(directory, plan, max_shard_bytes=max_shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return directory


def text_of(report: LsReport | VerifyReport | DiffReport) -> str:
    console = Console(file=io.StringIO(), width=200)
    show(report, console)
    return console.file.getvalue()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for step in (10, 20):
        save(tmp_path / "run" / "checkpoints", step)
    return tmp_path / "run"


def flip(path: Path, byte: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[byte] ^= 1
    path.write_bytes(raw)


def test_ls(run_dir: Path) -> None:
    report = run_ls(LsConfig(path=run_dir))
    assert report == run_ls(LsConfig(path=run_dir / "checkpoints"))
    assert [(row.step, row.newest, row.status, row.num_tensors) for row in report.generations] == [
        (20, True, "ok", 3),
        (10, False, "ok", 3),
    ]
    files = (run_dir / "checkpoints" / "step-00000020").iterdir()
    assert report.generations[0].num_bytes == sum(f.stat().st_size for f in files if f.name != "MANIFEST.json")
    assert report.generations[0].created.endswith("+00:00")
    assert report.exit_code == 0 and not report.notes
    assert json.loads(json.dumps(report.as_json()))["generations"][0]["name"] == "step-00000020"
    assert "resume starts here" in text_of(report)


def test_ls_shows_what_is_wrong(run_dir: Path) -> None:
    root = run_dir / "checkpoints"
    (root / "step-00000020" / "model.safetensors").unlink()
    (root / "step-00000030.tmp-00ff").mkdir()
    flip(root / "LATEST", 40)
    report = run_ls(LsConfig(path=run_dir))
    assert [(row.step, row.newest) for row in report.generations] == [(20, False), (10, True)]
    assert report.generations[0].status == "model.safetensors: the file is missing"
    assert any("LATEST" in note for note in report.notes)
    assert any("step-00000030.tmp-00ff" in note for note in report.notes)
    assert "the file is missing" in text_of(report)


def test_verify_intact(run_dir: Path) -> None:
    for path, count in ((run_dir, 2), (run_dir / "checkpoints", 2), (run_dir / "checkpoints" / "step-00000010", 1)):
        report = run_verify(VerifyConfig(path=path))
        assert report.exit_code == 0 and not report.problems
        assert len(report.checked) == count and report.hashed
        assert "intact" in text_of(report)


def test_verify_names_file_and_tensor(run_dir: Path) -> None:
    path = run_dir / "checkpoints" / "step-00000010"
    flip(path / "model.safetensors", (path / "model.safetensors").stat().st_size - 1)
    for place in (run_dir, path):
        report = run_verify(VerifyConfig(path=place))
        assert report.exit_code == 1
        assert [(one.file, one.tensor) for one in report.problems] == [("step-00000010/model.safetensors", "half")]
        assert "step-00000010/model.safetensors: half: does not match its hash" in text_of(report)


def test_verify_model_directory(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", {"a": torch.ones(3, 5), "b": torch.ones(7)}, max_shard_bytes=60)
    report = run_verify(VerifyConfig(path=model))
    assert report.exit_code == 0 and not report.hashed and len(report.checked) == 2
    os.truncate(model / report.checked[1], 20)
    report = run_verify(VerifyConfig(path=model))
    assert report.exit_code == 1
    assert report.problems[0].file == "model-00002-of-00002.safetensors"
    assert "cut off" in text_of(report)


def test_diff_equal_runs(run_dir: Path, tmp_path: Path) -> None:
    save(tmp_path / "other" / "checkpoints", 20, recipe={"run": {"dir": "elsewhere"}})
    report = run_diff(DiffConfig(left=run_dir, right=tmp_path / "other"))
    assert report.exit_code == 0 and not report.differences
    assert report.num_tensors == 3 and report.num_bytes == 60 + 30 + 60
    assert "state.json:recipe" in {one.name for one in report.circumstances}
    assert "bit-equal" in text_of(report)


def test_diff_names_what_differs(tmp_path: Path) -> None:
    weight = torch.arange(15.0).reshape(3, 5)
    changed = weight.clone()
    changed[1, 2] += 0.5
    left = save(tmp_path / "left", 7, weight, guard={"mean": 1.0})
    right = save(tmp_path / "right", 7, changed, guard={"mean": 1.5}, more=1)
    report = run_diff(DiffConfig(left=left, right=right))
    assert report.exit_code == 1
    found = {one.name: one for one in report.differences}
    assert found.keys() == {"model.safetensors:w", "model.safetensors:half", "state.json:guard.mean", "state.json:more"}
    assert found["model.safetensors:w"].max_abs == 0.5
    assert found["model.safetensors:w"].num_elements == 1
    assert found["model.safetensors:half"].max_abs == 0.5
    assert found["state.json:guard.mean"].max_abs == 0.5
    assert found["state.json:more"].what == "only right"
    assert "max |A - B| = 0.5" in text_of(report)


def test_diff_tells_signed_zero_and_nan_patterns_apart(tmp_path: Path) -> None:
    left = save(tmp_path / "left", 7, torch.tensor([0.0, 1.0]))
    right = save(tmp_path / "right", 7, torch.tensor([-0.0, 1.0]))
    report = run_diff(DiffConfig(left=left, right=right))
    assert report.exit_code == 1
    assert report.differences[0].max_abs == 0


def test_diff_models_whatever_their_shards(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3, 5), "b": torch.ones(7), "c": torch.ones(2, dtype=torch.int64)}
    one = write_model(tmp_path / "one", tensors)
    many = write_model(tmp_path / "many", tensors, max_shard_bytes=40, transformers_version="5")
    report = run_diff(DiffConfig(left=one, right=many))
    assert report.exit_code == 0 and report.num_tensors == 3
    other = {"a": torch.ones(5, 3), "b": torch.ones(7).half(), "d": torch.ones(1)}
    report = run_diff(DiffConfig(left=one, right=write_model(tmp_path / "other", other, rope_theta=1e6)))
    assert [(d.name, d.what) for d in report.differences] == [
        ("a", "shape"),
        ("b", "dtype"),
        ("c", "only left"),
        ("d", "only right"),
        ("config.json:rope_theta", "only right"),
    ]


def test_bad_input(run_dir: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", {"a": torch.ones(1)})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="like with like"):
        run_diff(DiffConfig(left=model, right=run_dir))
    for bad in (tmp_path / "none", tmp_path / "empty", tmp_path / "a\0b"):
        with pytest.raises(CheckpointError) as caught:
            run_diff(DiffConfig(left=bad, right=run_dir))
        assert caught.value.exit_code == 2
        with pytest.raises(CheckpointError):
            run_ls(LsConfig(path=bad))
        with pytest.raises(CheckpointError):
            run_verify(VerifyConfig(path=bad))
    (model / "model.safetensors").write_bytes(b"\x80\x04.")
    with pytest.raises(FormatError):
        run_diff(DiffConfig(left=model, right=model))
    os.truncate(run_dir / "checkpoints" / "step-00000020" / "model.safetensors", 50)
    with pytest.raises(CheckpointError, match=r"cut off(.|\n)*ckpt verify"):
        run_diff(DiffConfig(left=run_dir, right=run_dir))


def test_nothing_is_written(run_dir: Path) -> None:
    before = {path: path.lstat().st_mtime_ns for path in run_dir.rglob("*")}
    shutil.copytree(run_dir, run_dir.parent / "copy")
    run_ls(LsConfig(path=run_dir))
    run_verify(VerifyConfig(path=run_dir))
    run_diff(DiffConfig(left=run_dir, right=run_dir.parent / "copy"))
    assert {path: path.lstat().st_mtime_ns for path in run_dir.rglob("*")} == before


def test_no_torch() -> None:
    code = "import sys, skymoe.ckpt.run, skymoe.ckpt.table; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_human_bytes() -> None:
    assert [human_bytes(n) for n in (0, 999, 1000, 1_234_567, 146_360_000_000, 5 * 10**12)] == [
        "0 B", "999 B", "1 kB", "1.23 MB", "146 GB", "5,000 GB",
    ]  # fmt: skip
