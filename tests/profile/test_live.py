"""Bytes of tensors alive, against what is known by hand."""

from __future__ import annotations

import torch

from skymoe.model.recompute import recompute_layer
from skymoe.profile.layers import kept_bytes
from skymoe.profile.live import LiveBytes

SIZE = 50 * 100 * 4


def test_counts_storages_once_and_forgets_them() -> None:
    before = torch.zeros(1000)
    with LiveBytes() as live:
        x = torch.zeros(50, 100)
        view = x[:10]
        before.add_(1)
        assert live.now == SIZE
        y = x + 1
        assert live.now == 2 * SIZE
        del x, y
        assert live.now == SIZE, "a view holds its storage"
        del view
        assert live.now == 0 and live.peak == 2 * SIZE
        live.reset_peak()
        assert live.peak == 0


def test_what_autograd_keeps() -> None:
    weight = torch.randn(100, 100, requires_grad=True)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(torch.sigmoid(x @ weight) @ weight)

    def plain() -> torch.Tensor:
        return layer(torch.randn(50, 100, requires_grad=True)).sum()

    def again() -> torch.Tensor:
        return recompute_layer(layer, torch.randn(50, 100, requires_grad=True)).sum()

    assert kept_bytes(plain) == 3 * SIZE  # the input, and what each sigmoid gave
    assert kept_bytes(again) == SIZE
