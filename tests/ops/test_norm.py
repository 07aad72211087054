from __future__ import annotations

import pytest
import torch

from skymoe.ops.norm import rms_norm


def formula(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def test_by_hand() -> None:
    x, weight = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0])
    expected = torch.tensor([3.0, 8.0]) / (12.5 + 0.5) ** 0.5
    torch.testing.assert_close(rms_norm(x, weight, 0.5), expected)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4, 6)])
def test_value_and_gradients_are_the_formula(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape[-1], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), formula(x, weight, 1e-6))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-6), (x, weight))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_narrow_inputs_are_normalized_in_fp32(autocast: bool, weight_dtype: torch.dtype) -> None:
    x, weight = (1000 * torch.randn(4, 33)).bfloat16(), torch.randn(33).to(weight_dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = rms_norm(x, weight, 1e-6)
    assert ours.dtype is torch.bfloat16
    assert ours.equal(formula(x.float(), weight.float(), 1e-6).bfloat16()) or torch.allclose(
        ours.float(), formula(x.float(), weight.float(), 1e-6), rtol=2**-8
    )


def test_zeros_stay_zero() -> None:
    x = torch.zeros(2, 5, requires_grad=True)
    out = rms_norm(x, torch.ones(5), 1e-6)
    out.sum().backward()
    assert (out == 0).all() and x.grad is not None and x.grad.isfinite().all()


def test_strided_heads() -> None:
    """q/k norm sees (B, H, T, C) as a transposed view."""
    x = torch.randn(2, 5, 3, 4).transpose(1, 2).requires_grad_()
    weight = torch.rand(4)
    ours = rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(ours, formula(x, weight, 1e-6))
    direction = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, x, direction), torch.autograd.grad(formula(x, weight, 1e-6), x, direction)
    )


def test_backward_inside_autocast_is_not_narrowed() -> None:
    """Many training loops call backward within the autocast block; on a CPU it then sees autocast switched on."""
    x, weight = torch.randn(40, 33, requires_grad=True), torch.rand(33, requires_grad=True)
    direction = torch.randn(40, 33).bfloat16()
    expected = torch.autograd.grad(formula(x, weight, 1e-6), (x, weight), direction.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(rms_norm(x, weight, 1e-6), (x, weight), direction)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
