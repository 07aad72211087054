"""Row i of a linear layer is the same to the bit, whatever stands in the other rows, and on any number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skymoe.ops.invariant import TILE, by_expert, invariant_linear, sigmoid, swiglu

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def alone(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Each row in a batch of its own."""
    return torch.cat([invariant_linear(x_NI[i : i + 1], weight_OI, bias_O) for i in range(len(x_NI))])


def cancelling(x_RI: Tensor, sign: float) -> Tensor:
    """The second half of the columns is `sign` times the first.

    Products of such rows, +1 with -1, are sums that cancel: nothing is left but what rounding left, and that shows in
    what order they were added. In sums that do not cancel, rounding to bf16 hides it.
    """
    half = x_RI.shape[1] // 2
    x_RI[:, half : 2 * half] = sign * x_RI[:, :half]
    return x_RI


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


@settings(deadline=None, max_examples=100)
@given(
    dtype=st.sampled_from(DTYPES),
    inputs=st.one_of(st.integers(1, 70), st.sampled_from([96, 200, 511, 1024, 1153, 2816, 4608])),
    outputs=st.one_of(st.integers(1, 70), st.integers(100, 300)),
    rows=st.one_of(st.integers(1, 20), st.integers(1, 130)),
    offset=st.sampled_from([0, 0, 1, 3, 8]),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 2**31),
)
def test_a_row_depends_on_itself_alone(
    dtype: torch.dtype, inputs: int, outputs: int, rows: int, offset: int, threads: int, seed: int
) -> None:
    torch.manual_seed(seed)
    weight = torch.empty(outputs * inputs + offset, dtype=dtype)[offset:].view(outputs, inputs)  # aligned or not
    weight.copy_(cancelling(torch.randn(outputs, inputs), -1.0))
    x, bias = cancelling(torch.randn(rows, inputs), 1.0).to(dtype), torch.randn(outputs).to(dtype) * 1e-9
    some = torch.randperm(rows)[:4]
    torch.set_num_threads(1)
    wanted = alone(x[some], weight, bias)
    torch.set_num_threads(threads)
    together = invariant_linear(x, weight, bias)
    assert torch.equal(bits(together[some]), bits(wanted))
    around = cancelling(torch.randn(rows, inputs), 1.0).to(dtype)  # other neighbours, other places
    places = torch.randperm(rows)[:4]
    around[places] = x[some]
    assert torch.equal(bits(invariant_linear(around, weight, bias)[places]), bits(wanted))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, TILE, TILE + 1, 40])
@pytest.mark.parametrize("outputs", [1, 5, 16, 17, 48, 97])
def test_it_is_the_linear_layer(dtype: torch.dtype, rows: int, outputs: int) -> None:
    torch.manual_seed(rows)
    x, weight, bias = (
        torch.randn(rows, 37).to(dtype),
        torch.randn(outputs, 37).to(dtype),
        torch.randn(outputs).to(dtype),
    )
    wanted = x.double() @ weight.double().T
    y = invariant_linear(x, weight)
    assert y.shape == wanted.shape and y.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(y.double(), wanted, rtol=tolerance, atol=37 * tolerance / 10)
    torch.testing.assert_close(invariant_linear(x, weight, bias), y + bias, rtol=0, atol=0)


def test_a_row_of_nan_stays_a_row_of_nan() -> None:
    x = torch.randn(11, 30)
    bad = x.clone()
    bad[4] = float("nan")
    weight = torch.randn(50, 30)
    rest = [i for i in range(11) if i != 4]
    assert torch.equal(invariant_linear(bad, weight)[rest], invariant_linear(x, weight)[rest])


@settings(deadline=None, max_examples=40)
@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any), seed=st.integers(0, 2**31))
def test_experts_are_the_rows_of_each_expert_alone(counts: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(len(counts), 40, 33)
    x = torch.randn(sum(counts), 33)
    asked = []

    def linear(expert: int, rows: Tensor) -> Tensor:
        asked.append(expert)
        return invariant_linear(rows, weight[expert])

    y = by_expert(x, counts, linear)
    assert asked == [expert for expert, count in enumerate(counts) if count]
    owner = [expert for expert, count in enumerate(counts) for _ in range(count)]
    for row, expert in enumerate(owner):
        assert torch.equal(y[row : row + 1], invariant_linear(x[row : row + 1], weight[expert]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 14, 56, 80, 400, 2000])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_activations_of_a_row_depend_on_itself_alone(dtype: torch.dtype, width: int, num_threads: int) -> None:
    torch.manual_seed(width)
    x = torch.randn(301, width).to(dtype) * 3
    torch.set_num_threads(num_threads)
    for function in (sigmoid, swiglu):
        together = function(x)
        for size in (1, 17):
            assert torch.equal(bits(together), bits(torch.cat([function(part) for part in x.split(size)])))
    tolerance = 1e-6 if dtype == torch.float32 else 0.01
    torch.testing.assert_close(sigmoid(x), x.sigmoid(), rtol=tolerance, atol=0)
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(swiglu(x), F.silu(gate) * up, rtol=2 * tolerance, atol=1e-30)
    assert swiglu(torch.tensor([[-200.0, 3.0]])).item() == 0
