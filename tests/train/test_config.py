from __future__ import annotations

from pathlib import Path

import pytest
from train.tiny import MOE, recipe

from skymoe.base.config import dump_config, read_config
from skymoe.base.errors import ConfigError
from skymoe.spec.model import Architecture, GateNormSpec
from skymoe.train.build import resolve_spec
from skymoe.train.config import TrainConfig
from skymoe.train.model_config import SpecConfig

RECIPES = Path(__file__).parents[2] / "recipes"


def test_a_recipe_returns_from_its_yaml(tmp_path):
    config = recipe(tmp_path)
    (tmp_path / "recipe.yaml").write_text(dump_config(config))
    assert read_config(TrainConfig, tmp_path / "recipe.yaml") == config


@pytest.mark.parametrize(
    "change, told",
    [
        ({"optimizer": {"learning_rate": 1.0}}, "optimizer.learning_rate"),
        ({"steps": 0}, "steps"),
        ({"balance": {"aux": "gshard"}}, "balance.aux"),
        ({"model": {"preset": "skywork-moe"}}, "exactly one of path, preset and spec"),
        ({"model": {"spec": None}}, "exactly one of path, preset and spec; got none"),
        ({"recompute": -1}, "recompute"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, "betas must be in"),
        ({"precision": {"compute": "int8"}}, "compute must be one of"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, told):
    with pytest.raises(ConfigError) as caught:
        recipe(tmp_path, **change)
    assert told in str(caught.value)


def test_two_sources_of_one_name_are_refused(tmp_path):
    source = {"path": str(tmp_path / "data/train")}
    with pytest.raises(ConfigError, match="same name"):
        recipe(tmp_path, data={"train": [source, source]})


def test_what_a_spec_leaves_out_follows_from_the_rest():
    spec = SpecConfig.model_validate({**MOE, "num_kv_heads": None}, strict=False).to_spec()
    assert (spec.architecture, spec.num_kv_heads, spec.head_dim) == (Architecture.SKYMOE, 2, 16)
    assert spec.moe is not None and spec.moe.gate_norm == GateNormSpec()
    assert spec.moe_layer_ids == (0, 1)


def test_dense_layers_need_a_width():
    with pytest.raises(ConfigError, match="ffn_size"):
        SpecConfig.model_validate({**MOE, "ffn_size": None, "moe": None}, strict=False).to_spec()


def test_the_gate_can_be_changed_against_what_the_model_says(tmp_path):
    spec = resolve_spec(recipe(tmp_path, model={"spec": MOE, "gate_norm": False, "expert_bias": True}))
    assert spec.moe is not None and spec.moe.gate_norm is None and spec.moe.expert_bias


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_we_ship_is_valid(path):
    config = read_config(TrainConfig, path)
    if config.model.path is None:
        resolve_spec(config)
