"""What is written into pages reads back: exactly, or within the rounding of its number format."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skymoe.ops.fp8 import decode_e4m3
from skymoe.ops.paged_store import PagedStore

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn]


@settings(deadline=None, max_examples=60)
@given(
    dtype=st.sampled_from(DTYPES), page=st.integers(1, 20), heads=st.integers(0, 3), width=st.integers(1, 40),
    size=st.sampled_from([1e-38, 1e-6, 1.0, 3e4]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_it_reads_back(dtype: torch.dtype, page: int, heads: int, width: int, size: float, seed: int) -> None:
    torch.manual_seed(seed)
    store = PagedStore(heads, 7, page, width, dtype)
    slots = torch.randperm(7 * page)[: 3 * page]
    x_NGC = torch.randn(3 * page, heads, width) * size
    store.write(x_NGC, slots)
    y_NGC = store.read(torch.arange(7))[:, slots].transpose(0, 1)
    assert y_NGC.dtype == torch.float32
    if dtype != torch.float8_e4m3fn:
        assert torch.equal(y_NGC, x_NGC.to(dtype).float())
    elif x_NGC.numel():  # half a step of e4m3 at the largest number, and of its subnormals
        largest = x_NGC.abs().amax(-1, keepdim=True)
        error = (y_NGC - x_NGC).abs()
        assert bool((error <= torch.maximum(x_NGC.abs() / 16, largest / 448 / 512 / 2) * 1.01 + 1e-40).all())


def test_fp8_is_codes_times_scale() -> None:
    store = PagedStore(2, 3, 4, 8, torch.float8_e4m3fn)
    x = torch.randn(5, 2, 8)
    x[3] = 0
    slots = torch.tensor([11, 0, 3, 7, 6])
    store.write(x, slots)
    scale = x.abs().amax(-1, keepdim=True) / 448
    scale[scale == 0] = 1
    wanted = decode_e4m3((x / scale).to(torch.float8_e4m3fn)) * scale
    assert torch.equal(store.read(torch.arange(3))[:, slots].transpose(0, 1), wanted)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so_and_alone(value: float) -> None:
    for dtype in DTYPES:
        store = PagedStore(1, 1, 4, 8, dtype)
        x = torch.ones(2, 1, 8)
        x[1, 0, 3] = value
        store.write(x, torch.tensor([0, 1]))
        y = store.read(torch.tensor([0]))[0]
        assert not y[1, 3].isfinite() and torch.equal(y[0], torch.ones(8))


def test_bytes() -> None:
    sizes = {dtype: PagedStore(3, 5, 4, 16, dtype).num_bytes for dtype in DTYPES}
    assert [sizes[dtype] for dtype in DTYPES] == [60 * 64, 60 * 32, 60 * 20]
