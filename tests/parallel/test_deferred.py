"""Weight gradients that are put off equal those of ordinary autograd, with autocast, recomputation and flat buffers."""

from __future__ import annotations

import copy

import pytest
import torch
from model.conftest import make_spec
from torch import Tensor, nn

from skymoe.model.init import initialize
from skymoe.model.linear import Linear
from skymoe.model.moe import Experts
from skymoe.model.transformer import Transformer
from skymoe.ops.experts import ExpertsBackend
from skymoe.parallel.deferred import DeferredWeights, defer_weights
from skymoe.spec.model import MoESpec

SPEC = make_spec(
    num_layers=2, hidden_size=16, ffn_size=24, mlp_bias=True,
    moe=MoESpec(num_experts=4, top_k=2, ffn_size=16, shared_ffn_size=8),
)  # fmt: skip


def gradients(
    model: Transformer, tokens_BT: Tensor, *, autocast: bool = False, recompute: tuple[int, ...] = ()
) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model.logits(model.hidden(tokens_BT, recompute=recompute).hidden_BTD).float().square().mean()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def two_models(dtype: torch.dtype, backend: ExpertsBackend) -> tuple[Transformer, Transformer, DeferredWeights, Tensor]:
    usual = initialize(Transformer(SPEC, experts=backend), seed=0).to(dtype)
    for index, parameter in enumerate(usual.parameters()):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)).to(dtype)
    other = copy.deepcopy(usual)
    deferred = defer_weights(other, DeferredWeights())
    tokens_BT = torch.randint(0, SPEC.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))
    return usual, other, deferred, tokens_BT


@pytest.mark.parametrize("recompute", [(), (0, 1)], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    ("dtype", "backend", "autocast", "tolerance"),
    [
        (torch.float64, ExpertsBackend.LOOP, False, 1e-12),
        (torch.float32, ExpertsBackend.LOOP, False, 1e-6),
        (torch.float32, ExpertsBackend.GROUPED, False, 1e-6),
        (torch.float32, ExpertsBackend.LOOP, True, 1e-6),
        (torch.float32, ExpertsBackend.GROUPED, True, 1e-6),
        (torch.bfloat16, ExpertsBackend.GROUPED, False, 1e-6),
    ],
)
def test_gradients_are_those_of_autograd(
    dtype: torch.dtype, backend: ExpertsBackend, autocast: bool, tolerance: float, recompute: tuple[int, ...]
) -> None:
    """Two micro-batches, whose weight gradients are formed in the other order than they were put off."""
    usual, other, deferred, tokens_BT = two_models(dtype, backend)
    micros = [tokens_BT, tokens_BT.flip(0, 1)]
    for micro in micros:
        expected = gradients(usual, micro, autocast=autocast, recompute=recompute)
    late = []
    for micro in micros:
        gradients(other, micro, autocast=autocast, recompute=recompute)
        assert len(deferred) > 10
        late.append(deferred.take())
        assert len(deferred) == 0
    assert other.layers[0].attention.q.weight.grad is None
    for run in late:
        run()
    found = {name: parameter.grad for name, parameter in other.named_parameters() if parameter.grad is not None}
    assert found.keys() == expected.keys() == dict(usual.named_parameters()).keys()
    for name, gradient in expected.items():
        assert found[name].dtype == gradient.dtype
        torch.testing.assert_close(
            found[name], gradient, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_input_gradients_come_before_any_weight_gradient() -> None:
    layers = nn.Sequential(Linear(4, 6, bias=True), Linear(6, 3))
    for parameter in layers.parameters():
        nn.init.normal_(parameter)
    deferred = defer_weights(layers, DeferredWeights())
    x = torch.randn(5, 4, requires_grad=True)
    layers(x).square().sum().backward()
    assert x.grad is not None and all(parameter.grad is None for parameter in layers.parameters())
    assert len(deferred) == 2
    deferred.take()()
    assert all(parameter.grad is not None for parameter in layers.parameters())


def test_gradients_are_added_where_they_are_kept() -> None:
    """`.grad` may be a view of a flat fp32 buffer while the weight is bf16."""
    layer = Linear(8, 4).to(torch.bfloat16)
    nn.init.ones_(layer.weight)
    flat = torch.full((40,), 2.0)
    layer.weight.grad_dtype = torch.float32
    layer.weight.grad = flat[4:36].view(4, 8)
    deferred = defer_weights(layer, DeferredWeights())
    layer(torch.ones(3, 8, dtype=torch.bfloat16)).sum().backward()
    deferred.take()()
    assert layer.weight.grad.data_ptr() == flat[4:].data_ptr()
    assert flat.tolist() == [2.0] * 4 + [5.0] * 32 + [2.0] * 4


@pytest.mark.parametrize("backend", list(ExpertsBackend))
def test_experts_without_rows(backend: ExpertsBackend) -> None:
    experts = Experts(8, MoESpec(num_experts=3, top_k=1, ffn_size=8), backend)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    experts(torch.randn(0, 8), torch.zeros(3, dtype=torch.int32)).sum().backward()
    assert (experts.gate_up.grad == 0).all(), "the ordinary way"
    deferred = defer_weights(experts, DeferredWeights())
    for sizes in ([0, 0, 0], [0, 4, 0]):
        x = torch.randn(sum(sizes), 8, requires_grad=True)
        experts(x, torch.tensor(sizes).cumsum(0).to(torch.int32)).sum().backward()
        deferred.take()()
        used = experts.gate_up.grad.abs().sum((1, 2)) > 0
        assert used.tolist() == [size > 0 for size in sizes]
