"""How much of the machine a training step uses: MFU counts the model's arithmetic, HFU what the hardware does.

    MFU = model FLOPs per token * tokens per second / peak             6N + attention: forward once, backward twice
    HFU = hardware FLOPs per token * tokens per second / peak          ... and what is computed again

A recomputed layer costs its forward once more, counted layer by layer, because an uneven pipeline recomputes
different layers in different stages and a stage may end in the middle of a layer. The statistics pass of the balance
loss costs one more forward of everything up to the final norm. HFU says how busy the machine is; MFU how much of that
was of use. Where nothing is recomputed they are the same.

The peak is that of all devices together, so a bubble of the pipeline or a slow rank lowers both. Not counted as
hardware work: the router that every tensor-parallel rank computes for itself under dispatch mode R, padding, and what
is not a matrix multiplication. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from skymoe.base.errors import ConfigError
from skymoe.spec.flops import AttentionCount, flops_per_token
from skymoe.spec.layout import Half, Layout
from skymoe.spec.model import ModelSpec


@dataclass(frozen=True, kw_only=True)
class TrainingFlops:
    """FLOPs per token of a training step, by convention for attention (see `flops.py`).

    Attributes:
        model_causal, model_full: forward and backward of the model, each part once.
        hardware_causal, hardware_full: the same, with what is computed again.
    """

    model_causal: float
    model_full: float
    hardware_causal: float
    hardware_full: float


@dataclass(frozen=True, kw_only=True)
class Utilisation:
    """Shares of the peak. HFU counts the triangle of causal attention, as the kernels do."""

    mfu_causal: float
    mfu_full: float
    hfu: float


def training_flops(
    spec: ModelSpec, sequence_length: int, recomputed_layers: Iterable[int | Half] = (), statistics_pass: bool = False
) -> TrainingFlops:
    """What a token of a training step costs.

    Args:
        spec: the model.
        sequence_length: T, in tokens.
        recomputed_layers: what is run again in the backward pass: whole layers by number, or halves of layers
            (`recomputed_halves` of a layout). What occurs twice counts once.
        statistics_pass: whether the balance loss runs a forward pass of its own (several micro-batches, statistics of
            the global batch).

    Raises:
        ConfigError: `sequence_length` is not positive, or a layer is not in the model.
    """
    halves = {half for item in recomputed_layers for half in _halves(item)}
    if wrong := sorted({half.layer for half in halves} - set(range(spec.num_layers))):
        raise ConfigError(f"layers {wrong} are recomputed, the model has {spec.num_layers}", where="recompute")
    model, hardware = [], []
    for convention in (AttentionCount.CAUSAL, AttentionCount.FULL):
        forward = flops_per_token(spec, sequence_length, attention=convention)
        again = sum((forward.attention if is_attention else forward.ffn)[layer] for layer, is_attention in halves)
        statistics = sum(forward.layers) if statistics_pass else 0.0
        model.append(3 * forward.total)
        hardware.append(3 * forward.total + again + statistics)
    return TrainingFlops(
        model_causal=model[0], model_full=model[1], hardware_causal=hardware[0], hardware_full=hardware[1]
    )


def recomputed_halves(layout: Layout) -> tuple[Half, ...]:
    """The halves of layers that `layout` runs again, over all stages in the order of the model."""
    return tuple(
        half
        for stage in range(layout.num_stages)
        for half in layout.halves(stage)
        if half.layer in layout.recomputed_layers(stage)
    )


def utilisation(flops: TrainingFlops, tokens_per_second: float, peak_flops_per_second: float) -> Utilisation:
    """MFU and HFU of all devices together: `tokens_per_second` of the world against the sum of their peaks."""
    rate = tokens_per_second / peak_flops_per_second
    return Utilisation(
        mfu_causal=flops.model_causal * rate, mfu_full=flops.model_full * rate, hfu=flops.hardware_causal * rate
    )


def _halves(item: int | Half) -> tuple[Half, ...]:
    return (item,) if isinstance(item, Half) else (Half(item, True), Half(item, False))
