from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from skymoe.ops.experts import ExpertsBackend, can_group, expert_swiglu, swiglu

BACKENDS = [ExpertsBackend.LOOP, ExpertsBackend.GROUPED]


def make(
    sizes: list[int], d: int, f: int, dtype: torch.dtype, *, gradient: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, gate_up, down = (
        (0.3 * torch.randn(*shape, generator=generator)).to(dtype).requires_grad_(gradient)
        for shape in ((sum(sizes), d), (len(sizes), 2 * f, d), (len(sizes), d, f))
    )
    return x, gate_up, down, torch.tensor(sizes).cumsum(0).to(torch.int32)


def by_hand(x: Tensor, gate_up: Tensor, down: Tensor, sizes: list[int]) -> Tensor:
    expert_of_row = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    rows = []
    for row, expert in zip(x, expert_of_row.tolist(), strict=True):
        gate, up = (gate_up[expert] @ row).chunk(2)
        rows.append(down[expert] @ (gate * torch.sigmoid(gate) * up))
    return torch.stack(rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("d", "f"), [(8, 12), (24, 20), (5, 7), (8, 3), (6, 8)])
@pytest.mark.parametrize("sizes", [[3, 0, 5, 1], [0, 0, 4], [7]])
def test_fp32_and_its_gradients_are_the_formula(backend: ExpertsBackend, d: int, f: int, sizes: list[int]) -> None:
    """Widths that grouped_mm refuses (rows of no multiple of 16 bytes) work all the same; empty experts get zeros."""
    inputs = make(sizes, d, f, torch.float32, gradient=True)
    ours = expert_swiglu(*inputs, backend)
    expected = by_hand(*inputs[:3], sizes)
    torch.testing.assert_close(ours, expected)
    direction = torch.randn_like(expected)
    found = torch.autograd.grad(ours, inputs[:3], direction)
    wanted = torch.autograd.grad(expected, inputs[:3], direction)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for expert, size in enumerate(sizes):
        assert size or (found[1][expert] == 0).all()


def test_gradcheck_in_fp64_takes_the_loop() -> None:
    inputs = make([2, 0, 3], 4, 3, torch.float64, gradient=True)
    assert not can_group(torch.float64, 8, 8)
    for backend in BACKENDS:
        assert torch.autograd.gradcheck(
            lambda x, gate_up, down, backend=backend: expert_swiglu(x, gate_up, down, inputs[3], backend), inputs[:3]
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("d", "f"), [(16, 24), (12, 20)])
def test_bf16_is_close(backend: ExpertsBackend, d: int, f: int) -> None:
    x, gate_up, down, offsets = make([3, 0, 6], d, f, torch.bfloat16)
    expected = by_hand(x.float(), gate_up.float(), down.float(), [3, 0, 6])
    ours = expert_swiglu(x, gate_up, down, offsets, backend)
    assert ours.dtype is torch.bfloat16
    torch.testing.assert_close(ours.float(), expected, rtol=0.03, atol=0.01)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("d", "f"), [(16, 24), (12, 20), (5, 3)])
def test_autocast_multiplies_in_bf16_and_leaves_fp32_gradients(backend: ExpertsBackend, d: int, f: int) -> None:
    x, gate_up, down, offsets = make([3, 0, 6], d, f, torch.float32, gradient=True)
    with torch.autocast("cpu", torch.bfloat16):
        ours = expert_swiglu(x, gate_up, down, offsets, backend)
    assert ours.dtype is torch.bfloat16
    expected = by_hand(x, gate_up, down, [3, 0, 6])
    torch.testing.assert_close(ours.float(), expected, rtol=0.05, atol=0.02)
    direction = torch.randn_like(expected)
    found = torch.autograd.grad(ours, (x, gate_up, down), direction.bfloat16())
    wanted = torch.autograd.grad(expected, (x, gate_up, down), direction)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype is torch.float32
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_at_all(backend: ExpertsBackend) -> None:
    inputs = make([0, 0], 8, 4, torch.float32, gradient=True)
    out = expert_swiglu(*inputs, backend)
    assert out.shape == (0, 8)
    (out * 2).sum().backward()
    assert inputs[1].grad is None or (inputs[1].grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_incoming_gradient_will_do(backend: ExpertsBackend) -> None:
    """`sum` sends back an expanded tensor (strides 0), which grouped_mm does not take as it is."""
    x, gate_up, down, offsets = make([3, 2], 8, 4, torch.float32, gradient=True)
    out = expert_swiglu(x, gate_up, down, offsets, backend)
    expected = torch.autograd.grad(out, x, torch.ones_like(out), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x, retain_graph=True), expected)
    transposed = torch.autograd.grad(out, x, torch.ones(out.shape[::-1]).t())
    torch.testing.assert_close(transposed, expected)


def test_both_backends_agree_on_a_larger_layer() -> None:
    sizes = [33, 1, 0, 70, 17, 4, 0, 3]
    inputs = make(sizes, 64, 40, torch.float32)
    torch.testing.assert_close(*(expert_swiglu(*inputs, backend) for backend in BACKENDS))


def test_swiglu_is_silu_times_up() -> None:
    h = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    gate, up = h.detach().chunk(2, -1)
    torch.testing.assert_close(swiglu(h), F.silu(gate) * up)
    assert torch.autograd.gradcheck(swiglu, h)
    before = h.detach().clone()
    swiglu(h).sum().backward()
    assert h.detach().equal(before), "the input is left as it was"
