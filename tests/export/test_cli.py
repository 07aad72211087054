"""`skymoe export` as it is typed."""

from __future__ import annotations

import json
import shutil

import pytest
from export.models import NORMED, random_directory, with_moe

from skymoe import cli


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main([*map(str, arguments)])
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.fixture
def source(tmp_path):
    return random_directory(tmp_path / "source", with_moe(NORMED, gate_norm=None))


def test_what_was_written_is_told_as_text_and_as_data(source, tmp_path, capsys):
    assert call("export", source, tmp_path / "a", "--format", "qwen2_moe") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "skymoe -> qwen2_moe" in told
    assert "adapted: a shared expert of width 128 that adds exactly 0" in told
    assert "exact: yes" in told
    assert "no GGUF of it computes the same" in told
    assert call("export", source, tmp_path / "b", "--format", "mixtral", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["architecture"], data["exact"], data["fold"]) == ("mixtral", True, None)
    assert data["bytes_written"] > 0
    assert data["seconds"] >= 0
    assert "model.safetensors" in data["files"]


def test_a_dry_run_prints_every_tensor_on_one_line(source, tmp_path, capsys):
    assert call("export", source, tmp_path / "a", "--format", "mixtral", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    tensors = [line for line in lines if " -> copy -> " in line]
    assert len(tensors) == 3 + 3 * (2 + 4 + 1 + 6 * 3)
    assert "model.layers.2.mlp.experts.5.down_proj.weight" in tensors[-3]
    assert "model.layers.2.block_sparse_moe.experts.5.w2.weight [36x20 float32] 2880" in tensors[-3]
    assert any(f"{len(tensors)} tensors" in line for line in lines)
    assert call("export", source, tmp_path / "a", "--format", "mixtral", "--dry-run", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["tensors"]) == len(tensors)
    assert not (tmp_path / "a").exists()


def test_a_dry_run_refuses_what_the_run_would_and_tells_of_the_disk(source, tmp_path, capsys, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "theirs").write_text("")
    for dry in ([], ["--dry-run"]):
        assert call("export", source, tmp_path / "there", "--format", "mixtral", *dry) == 2
        assert "--overwrite" in capsys.readouterr().err
    command = ["export", source, tmp_path / "there", "--format", "mixtral", "--dry-run", "--overwrite"]
    assert call(*command) == 0
    assert "not enough space" not in capsys.readouterr().out
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert call(*command) == 0
    assert "not enough space" in capsys.readouterr().out
    assert call(*command, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["lack_of_space"][:16], data["disk_free"]) == ("not enough space", 1000)
    assert data["disk_bytes"] == data["bytes_written"] > 1000


def test_refusals_name_the_way_out(source, tmp_path, capsys):
    normed = random_directory(tmp_path / "normed", NORMED)
    assert call("export", normed, tmp_path / "a", "--format", "mixtral") == 2
    assert "--fold-gate-norm --text FILE" in capsys.readouterr().err
    assert call("export", normed, tmp_path / "a", "--format", "mixtral", "--fold-gate-norm") == 2
    assert "--text FILE" in capsys.readouterr().err
    assert call("export", source, tmp_path / "a") == 2
    assert "format" in capsys.readouterr().err
    assert call("export", source, source, "--format", "skymoe", "--overwrite") == 2
    assert "the output is the source" in capsys.readouterr().err
    assert call("export", source, tmp_path, "--format", "skymoe", "--overwrite") == 2
    assert "the source lies in the output" in capsys.readouterr().err
