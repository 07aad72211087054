"""A model's name: a preset, a directory, or neither."""

import json
from pathlib import Path

import pytest

from skymoe.base.errors import FormatError
from skymoe.spec.named import preset_or_directory, read_model
from skymoe.spec.presets import PRESETS, preset

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 100, "hidden_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip


def test_a_preset_wins_over_a_directory_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "skywork-moe").mkdir()
    (tmp_path / "skywork-moe" / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.chdir(tmp_path)
    assert preset_or_directory("skywork-moe") == read_model("skywork-moe") == preset("skywork-moe")
    assert preset_or_directory("./skywork-moe") == Path("skywork-moe")
    assert read_model("./skywork-moe").hidden_size == 32


@pytest.mark.parametrize("name", ["skywork-moo", "./skywork-moo", "nothing like it", ""])
def test_neither_names_what_there_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if not name:
        assert preset_or_directory(name) == Path(), "the directory that the user is in"
        return
    with pytest.raises(FormatError, match="no such model directory or preset") as caught:
        read_model(name)
    assert "skywork-moe?" in caught.value.hint or all(known in caught.value.hint for known in PRESETS)
