"""`skymoe merge-check` from the command line: exit codes, the table, the JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from skymoe.cli import main
from skymoe.model.init import initialize
from skymoe.model.save import save_pretrained
from skymoe.model.transformer import Transformer
from skymoe.spec.model import Architecture, ModelSpec, QkNorm

SPEC = ModelSpec(
    architecture=Architecture.QWEN3, vocab_size=31, hidden_size=12, num_layers=2, ffn_size=20, num_heads=3,
    num_kv_heads=1, head_dim=6, max_position=32, qk_norm=QkNorm.HEAD,
)  # fmt: skip


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    a = save_pretrained(initialize(Transformer(SPEC), 0), tmp_path / "a")
    b = save_pretrained(initialize(Transformer(SPEC), 1), tmp_path / "b")
    return str(a), str(b)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(["merge-check", *arguments])
    return int(left.value.code or 0)


def test_exit_codes(pair: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    a, b = pair
    assert run(a, a) == 0
    assert "equal: 25 the same bits" in capsys.readouterr().out
    assert run(a, b) == 1
    shown = capsys.readouterr().out
    assert "layers.*.attention.k.weight" in shown and "different: 9 the same bits, 16 different" in shown
    assert run(a, f"{a}-not-there") == 2
    assert "no such model directory" in capsys.readouterr().err
    assert run(a, b, "--tolerance", "-1") == 2
    assert run(a, a, "--experts") == 2


def test_json(pair: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    a, b = pair
    assert run(a, b, "--json", "--tolerance", "100") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["equal"] and answer["counts"] == {"same": 9, "different": 16} and len(answer["tensors"]) == 25
    assert run(a, b, "--json", "--raw") == 1
    assert json.loads(capsys.readouterr().out)["raw"] is True


def test_a_hostile_name_does_not_reach_the_terminal(pair: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    a, b = pair
    shutil.copy(Path(a) / "model.safetensors", b)
    (Path(b) / "config.json").write_text(json.dumps({"model_type": "llama", "\x1b[2Jclear": "\x1b]0;title\x07"}))
    assert run(a, b, "--raw") == 1
    assert "\x1b" not in capsys.readouterr().out
