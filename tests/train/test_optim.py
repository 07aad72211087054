from __future__ import annotations

import pytest
import torch
from train.tiny import MOE

from skymoe.base.errors import CheckpointError
from skymoe.model.init import initialize
from skymoe.model.transformer import Transformer
from skymoe.train.config import OptimizerConfig
from skymoe.train.model_config import SpecConfig
from skymoe.train.optim import Optimizer, parameter_groups


def make_model() -> Transformer:
    return initialize(Transformer(SpecConfig.model_validate(MOE, strict=False).to_spec()), seed=1)


def give_gradients(model: Transformer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_every_parameter_is_in_exactly_one_group_with_the_right_decay():
    model = make_model()
    groups = parameter_groups(model.named_parameters(), OptimizerConfig(router_lr_ratio=0.5))
    matrices, routers, vectors = groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(names.values())
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.0]
    assert {names[id(p)] for p in routers["params"]} == {f"layers.{layer}.moe.router.weight" for layer in (0, 1)}
    assert routers["lr_ratio"] == 0.5
    assert all(names[id(p)].endswith("norm.weight") for p in vectors["params"])


def test_one_update_is_adamw_of_the_textbook():
    model = make_model()
    config = OptimizerConfig(clip=0.0, weight_decay=0.2)
    optimizer = Optimizer(model, config)
    give_gradients(model, 0)
    weight = model.layers[0].attention.q.weight
    before, gradient = weight.detach().double().clone(), weight.grad.double().clone()
    optimizer.update(1e-2, grad_norm=float(optimizer.gradient_norm()))
    step = gradient / (gradient.abs() + config.eps)  # first step: both bias corrections cancel the betas
    torch.testing.assert_close(weight.detach().double(), before * (1 - 1e-2 * 0.2) - 1e-2 * step, rtol=1e-5, atol=1e-7)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_clipping_is_by_the_norm_over_all_parameters():
    model = make_model()
    optimizer = Optimizer(model, OptimizerConfig(clip=1.0))
    give_gradients(model, 0)
    flat = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    norm = float(optimizer.gradient_norm())
    assert norm == pytest.approx(float(flat.norm()), rel=1e-5)
    expected = model.norm.weight.grad / norm
    optimizer.update(1e-3, norm)
    moment = optimizer.tensors()["norm.weight/exp_avg"]
    torch.testing.assert_close(moment, expected * (1 - 0.9))


def test_state_by_name_returns_bit_for_bit():
    models = [make_model(), make_model()]
    optimizers = [Optimizer(model, OptimizerConfig()) for model in models]
    for seed in range(3):
        give_gradients(models[0], seed)
        optimizers[0].update(1e-2, 1.0)
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].restore(optimizers[0].tensors())
    for model, optimizer in zip(models, optimizers, strict=True):
        give_gradients(model, 9)
        optimizer.update(1e-2, 1.0)
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b), name
    tensors = optimizers[1].tensors()
    assert tensors.keys() == optimizers[0].tensors().keys()
    assert float(tensors["embed.weight/step"]) == 4


def test_restored_state_is_a_copy():
    models = [make_model(), make_model()]
    optimizers = [Optimizer(model, OptimizerConfig()) for model in models]
    give_gradients(models[0], 0)
    optimizers[0].update(1e-2, 1.0)
    saved = {name: tensor.clone() for name, tensor in optimizers[0].tensors().items()}
    optimizers[1].restore(saved)
    give_gradients(models[1], 1)
    optimizers[1].update(1e-2, 1.0)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in optimizers[0].tensors().items())


def test_state_of_another_model_is_refused_by_name():
    model = make_model()
    optimizer = Optimizer(model, OptimizerConfig())
    give_gradients(model, 0)
    optimizer.update(1e-2, 1.0)
    tensors = optimizer.tensors()
    with pytest.raises(CheckpointError, match="elsewhere"):
        optimizer.restore({**tensors, "elsewhere.weight/exp_avg": torch.zeros(1)})
    wrong = {**tensors, "norm.weight/exp_avg": torch.zeros(3)}
    with pytest.raises(CheckpointError, match=r"norm\.weight"):
        optimizer.restore(wrong)
