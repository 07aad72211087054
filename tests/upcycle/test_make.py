"""Parents with NaN or infinity: refused where values are reckoned with, so that one of them does not become many."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from skymoe.base.errors import FormatError
from skymoe.upcycle.centroids import router_centroids
from skymoe.upcycle.make import is_finite
from skymoe.upcycle.run import run
from tests.upcycle.conftest import TOKENS, config_of

UP = "model.layers.1.mlp.up_proj.weight"
ROUTER = "model.layers.1.block_sparse_moe.gate.weight"


def broken(source, path, name, value):
    """A copy of `source` with `value` as one element of tensor `name`."""
    shutil.copytree(source, path)
    tensors = load_file(path / "model.safetensors")
    tensors[name][3, 5] = value
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize(
    ("parent", "name", "options"),
    [
        ("llama", UP, {"method": "drop", "experts": 3}),
        ("llama", UP, {"method": "noise", "experts": 3}),
        ("mixtral", ROUTER, {"method": "duplicate"}),
    ],
)
def test_the_tensor_is_named_and_nothing_is_left(parent, name, options, value, parents, tmp_path):
    source = broken(parents(parent), tmp_path / "source", name, value)
    with pytest.raises(FormatError, match=f"{source}: tensor {name} holds NaN or infinity"):
        run(config_of(source, tmp_path / "moe", receipt_tokens=0, **options))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_averages_name_the_parent(parents, tmp_path):
    name = "model.layers.2.self_attn.q_proj.weight"
    other = broken(parents("llama"), tmp_path / "other", name, float("nan"))
    asked = {"method": "specialists", "experts": 2, "rest": "average", "receipt_tokens": 0}
    with pytest.raises(FormatError, match=f"{other}: tensor {name} holds NaN"):
        run(config_of([parents("llama"), other], tmp_path / "moe", **asked))


def test_centroids_name_the_layer(parents, tmp_path):
    source = broken(parents("llama"), tmp_path / "source", "model.layers.0.mlp.down_proj.weight", float("nan"))
    with pytest.raises(FormatError, match=f"{source}: .*feed-forward of layer 1 hold NaN or infinity"):
        router_centroids(source, TOKENS, layers=(0, 1, 2), clusters=4, seed=0)
    assert router_centroids(source, TOKENS, layers=(0,), clusters=4, seed=0)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_value_among_many_is_found(dtype):
    weight = torch.randn(37, 129).to(dtype)
    assert is_finite(weight)
    for value in (float("nan"), float("inf"), float("-inf")):
        for at in ((0, 0), (20, 64), (36, 128)):
            changed = weight.clone()
            changed[at] = value
            assert not is_finite(changed)
