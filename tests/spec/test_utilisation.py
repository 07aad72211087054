"""MFU and HFU: the paper's own figures, and the matrix multiplications that torch really makes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from skymoe.base.errors import ConfigError
from skymoe.model.init import initialize
from skymoe.model.transformer import Transformer
from skymoe.ops.loss import linear_cross_entropy
from skymoe.spec.layout import Half, Layout
from skymoe.spec.model import Architecture, ModelSpec, MoESpec
from skymoe.spec.presets import PRESETS
from skymoe.spec.split import Split
from skymoe.spec.utilisation import recomputed_parts, training_flops, utilisation

PAPER = PRESETS["skywork-moe"]
TINY = ModelSpec(
    architecture=Architecture.SKYWORK_MOE, vocab_size=61, hidden_size=32, num_layers=3, ffn_size=40, num_heads=2,
    num_kv_heads=1, head_dim=16, max_position=64, moe_layers=(1, 2),
    moe=MoESpec(num_experts=5, top_k=2, ffn_size=24),
)  # fmt: skip
TOKENS_BT = (2, 12)


def test_the_figures_of_the_paper():
    """690 tokens/s on one A800 of 312 TFLOP/s, sequences of 8192; a world of 1536 of them is no different."""
    for devices in (1, 1536):
        share = utilisation(training_flops(PAPER, 8192), 690 * devices, 312e12 * devices)
        assert 100 * share.mfu_causal == pytest.approx(32.3, abs=0.05)
        assert 100 * share.mfu_full == pytest.approx(34.9, abs=0.05)
        assert share.hfu == share.mfu_causal


def test_all_layers_again_and_a_statistics_pass_are_a_forward_each():
    flops = training_flops(PAPER, 8192, range(52))
    head = 3 * 2 * 65536 * 4608
    assert flops.hardware_causal - head == pytest.approx((flops.model_causal - head) * 4 / 3)
    assert flops.hardware_full - head == pytest.approx((flops.model_full - head) * 4 / 3)
    both = training_flops(PAPER, 8192, range(52), True)
    assert both.hardware_causal - head == pytest.approx((flops.model_causal - head) * 5 / 3)
    assert (both.model_causal, both.model_full) == (flops.model_causal, flops.model_full)


@pytest.mark.parametrize("recompute", [(), (0,), (2,), (0, 1), (0, 1, 2)])
@pytest.mark.parametrize("statistics", [False, True])
def test_hardware_flops_are_the_multiplications_that_torch_makes(recompute: tuple[int, ...], statistics: bool):
    model = Transformer(TINY)
    initialize(model, 0)
    tokens = torch.randint(0, TINY.vocab_size, TOKENS_BT)
    with counted() as counter:
        if statistics:
            with torch.no_grad():
                model.hidden(tokens)
        hidden = model.hidden(tokens, recompute=recompute).hidden_BTD
        linear_cross_entropy(hidden, model.head_weight, tokens)[0].backward()
    expected = training_flops(TINY, TOKENS_BT[1], recompute, statistics).hardware_full
    assert counter.flops / tokens.numel() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("is_attention", [True, False])
def test_halves_of_a_layer_that_is_cut(is_attention: bool):
    """One dense layer as two regions: its attention without the last projection, its feed-forward without its own."""
    spec = replace(PRESETS["mistral-7b"], num_layers=2)
    plain, one = training_flops(spec, 64), training_flops(spec, 64, [Half(1, is_attention)])
    attention = 4 * 4096 * 128 * (32 + 8) + 4 * 32 * 128 * 65 / 2 - 2 * 4096 * 4096
    assert one.hardware_causal - plain.hardware_causal == pytest.approx(attention if is_attention else 4 * 4096 * 14336)


def test_the_parts_of_an_uneven_layout_are_layers_and_halves():
    layout = Layout(pp=3, stages=Split((3, 3, 2)), recompute=(2, 1, 0))  # layers 0, 1a | 1b, 2 | 3
    assert recomputed_parts(layout) == (0, Half(1, True), Half(1, False))
    assert recomputed_parts(replace(layout, recompute=(0, 2, 1))) == (Half(1, False), 2, 3)
    assert recomputed_parts(replace(layout, recompute=(0, 0, 0))) == ()


def test_uneven_recompute_is_counted_stage_by_stage():
    """Twelve stages of the paper's pipeline; only the first ones need the memory."""
    layout = Layout(pp=12, stages=Split.remainder_first(52, 12).scaled(2), recompute=(5, 3, 1, *[0] * 9))
    flops, every = training_flops(PAPER, 8192, recomputed_parts(layout)), training_flops(PAPER, 8192, range(52))
    again = flops.hardware_causal - flops.model_causal
    assert again == pytest.approx((every.hardware_causal - every.model_causal) * 9 / 52)


def test_a_layer_that_is_not_there_is_told():
    with pytest.raises(ConfigError, match=r"layers \[3\] are recomputed, the model has 3"):
        training_flops(TINY, 12, [0, 3])
    with pytest.raises(ConfigError, match="sequence_length"):
        training_flops(TINY, 0)


class _Counter(TorchDispatchMode):
    """FLOPs of matrix multiplications by their shapes. A row times a matrix is a sum (the gradient of a norm)."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        shapes = [tuple(arg.shape) for arg in args if isinstance(arg, torch.Tensor)]
        match str(op):
            case "aten.mm.default" if shapes[0][0] > 1:
                self.flops += 2 * shapes[0][0] * shapes[0][1] * shapes[1][1]
            case "aten._grouped_mm.default":
                self.flops += 2 * shapes[0][0] * shapes[0][1] * shapes[1][-1]
            case "aten._scaled_dot_product_flash_attention_for_cpu.default":
                self.flops += _attention_flops(shapes[0])
            case "aten._scaled_dot_product_flash_attention_for_cpu_backward.default":
                self.flops += 2 * _attention_flops(shapes[1])
        return op(*args, **(kwargs or {}))


def _attention_flops(query_BHTd: tuple[int, ...]) -> int:
    batch, heads, length, size = query_BHTd
    return 4 * batch * heads * length * length * size


@contextmanager
def counted() -> Iterator[_Counter]:
    counter = _Counter()
    with counter:
        yield counter
