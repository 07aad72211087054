from __future__ import annotations

import math

import pytest
import torch

from skymoe.model.init import initial_tensor, initialize
from skymoe.model.transformer import Transformer
from skymoe.spec.model import MoESpec


def test_a_tensor_depends_on_its_name_and_the_seed_alone(spec, moe) -> None:
    """Other layers, experts elsewhere, another order of creation: the same numbers."""
    small, large = spec(moe=moe, moe_layers=(1,)), spec(moe=moe, moe_layers=(1,), vocab_size=50)
    for name, shape in (("layers.1.attention.q.weight", (24, 20)), ("layers.1.moe.router.weight", (5, 20))):
        value = initial_tensor(small, name, shape, 3)
        assert value.equal(initial_tensor(large, name, shape, 3)) and value.equal(initial_tensor(small, name, shape, 3))
        assert not value.equal(initial_tensor(small, name, shape, 4))
        assert not value.equal(initial_tensor(small, name.replace("1", "2", 1), shape, 3))


def test_any_number_of_layers_draws_the_same(spec) -> None:
    """Only the residual projections know the depth, and only as a factor."""
    shallow, deep = spec(num_layers=2), spec(num_layers=18)
    for name, shape in (("embed.weight", (37, 20)), ("layers.1.mlp.gate.weight", (28, 20))):
        assert initial_tensor(shallow, name, shape, 0).equal(initial_tensor(deep, name, shape, 0))
    for name, shape in (("layers.1.attention.o.weight", (20, 24)), ("layers.1.mlp.down.weight", (20, 28))):
        ratio = initial_tensor(shallow, name, shape, 0) / initial_tensor(deep, name, shape, 0)
        torch.testing.assert_close(ratio, torch.full(shape, 3.0))


@pytest.mark.parametrize("name", ["layers.0.moe.experts.gate_up", "layers.2.moe.experts.down"])
def test_a_rank_draws_just_its_own_experts(spec, name: str) -> None:
    whole = initial_tensor(spec(), name, (7, 6, 5), 1)
    assert initial_tensor(spec(), name, (3, 6, 5), 1).equal(whole[:3])
    assert initial_tensor(spec(), name, (2, 6, 5), 1, first_expert=4).equal(whole[4:6])
    assert not whole[0].equal(whole[1])


def test_standard_deviations(spec) -> None:
    moe = MoESpec(num_experts=4, top_k=2, ffn_size=200, shared_ffn_size=200)
    model_spec = spec(
        moe=moe, moe_layers=(1,), hidden_size=200, ffn_size=300, init_std=0.02, head_dim=32, vocab_size=500
    )
    model = initialize(Transformer(model_spec), 0)
    for name, value in model.named_parameters():
        residual = ".o." in name or "down" in name
        if "norm" in name:
            assert (value == 1).all(), name
        elif value.numel() > 5000:
            expected = 0.02 / math.sqrt(2 * 3) if residual else 0.02
            assert value.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(value.mean().item()) < 5 * expected / math.sqrt(value.numel()), name


def test_biases_and_buffers_are_zero_whatever_was_there(spec) -> None:
    """A model that was built on the meta device holds garbage until it is initialised."""
    moe = MoESpec(num_experts=4, top_k=2, ffn_size=8, expert_bias=True)
    with torch.device("meta"):
        model = Transformer(spec(moe=moe, moe_layers=(0, 2), qkv_bias=True, o_bias=True, mlp_bias=True))
    model = model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(float("nan"))
    initialize(model, 0)
    for name, value in model.state_dict().items():
        assert value.isfinite().all(), name
        assert not name.endswith("bias") or (value == 0).all(), name


def test_initialize_is_the_same_for_every_dtype_and_run(spec, moe) -> None:
    first, second = (initialize(Transformer(spec(moe=moe)), 5).state_dict() for _ in range(2))
    narrow = initialize(Transformer(spec(moe=moe)).bfloat16(), 5).state_dict()
    assert all(first[n].equal(second[n]) and narrow[n].equal(first[n].bfloat16()) for n in first)


def test_the_global_generator_is_left_alone(spec) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    initialize(Transformer(spec()), 0)
    assert torch.rand(3).equal(expected)


def test_known_values(spec) -> None:
    """Pinned: a change here changes every model that is trained from a seed."""
    value = initial_tensor(spec(init_std=1.0), "layers.0.attention.q.weight", (2, 2), 0)
    torch.testing.assert_close(value, torch.tensor([[-0.459234, -1.125254], [-1.035941, -2.326409]]), rtol=0, atol=2e-6)
