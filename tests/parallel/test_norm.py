"""RMSNorm over a dimension cut over ranks, against the whole."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from parallel.ranks import run_ranks
from torch import Tensor

from skymoe.ops.norm import reference_rms_norm, rms_norm
from skymoe.parallel.mesh import Group
from skymoe.parallel.norm import sharded_rms_norm
from skymoe.spec.split import Split


def make(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    x_BTX, weight_X, grad_BTX = (torch.randn(*shape, size, generator=generator) for shape in ((2, 3), (), (2, 3)))
    return x_BTX.to(dtype).requires_grad_(), weight_X.requires_grad_(), grad_BTX


def normed(parts: Split, dtype: torch.dtype, autocast: bool) -> tuple[Tensor, ...]:
    group = Group(tuple(range(parts.num_ranks)), dist.get_rank(), dist.group.WORLD)
    own = parts.part(group.rank)
    columns = slice(own.start, own.stop)
    whole, whole_weight, grad = make(parts.num_units, dtype)
    x = whole.detach()[..., columns].clone().requires_grad_()
    weight = whole_weight.detach()[columns].clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = sharded_rms_norm(x, weight, 1e-3, size=parts.num_units, group=group)
        y.backward(grad[..., columns].to(y.dtype))
    assert x.grad is not None and weight.grad is not None
    return y.detach(), x.grad, weight.grad


@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [
        (torch.float64, False, 1e-6),
        (torch.float32, False, 1e-5),
        (torch.bfloat16, False, 1e-2),
        (torch.float32, True, 1e-2),
    ],
)
@pytest.mark.parametrize("parts", [Split((4, 3)), Split((1, 6, 2)), Split((5, 0))])
def test_value_and_gradients_are_the_whole_ones(
    parts: Split, dtype: torch.dtype, autocast: bool, tolerance: float
) -> None:
    x, weight, grad = make(parts.num_units, dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = rms_norm(x, weight, 1e-3)
        expected.backward(grad.to(expected.dtype))
    found = run_ranks(parts.num_ranks, normed, parts, dtype, autocast)
    for index, wanted in enumerate((expected.detach(), x.grad, weight.grad)):
        assert wanted is not None
        ours = torch.cat([of_rank[index] for of_rank in found], dim=-1)
        assert ours.dtype is wanted.dtype
        torch.testing.assert_close(ours, wanted, rtol=tolerance, atol=tolerance)


def test_alone_it_is_the_formula() -> None:
    x, weight, _ = make(7, torch.float64)
    weight = weight.detach().double().requires_grad_()

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return sharded_rms_norm(x, weight, 1e-3, size=7, group=Group((0,), 0, None))

    torch.testing.assert_close(norm(x, weight), reference_rms_norm(x, weight, 1e-3))
    assert torch.autograd.gradcheck(norm, (x, weight))
