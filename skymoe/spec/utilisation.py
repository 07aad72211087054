"""How much of the machine a training step uses: MFU counts the model's arithmetic, HFU what the hardware does.

    MFU = model FLOPs per token * tokens per second / peak             6N + attention: forward once, backward twice
    HFU = hardware FLOPs per token * tokens per second / peak          ... and what is computed again

A recomputed layer costs its forward once more, counted layer by layer, because an uneven pipeline recomputes
different layers in different stages and a stage may end in the middle of a layer. Torch stops the second run at the
last tensor that the backward pass needs: the projection that ends a dense layer (or a half that ends a stage with the
attention) is not run again, the experts' is, because the gradient of the gate needs what they put out. The statistics
pass of the balance loss costs one more forward of everything up to the final norm. HFU says how busy the machine is;
MFU how much of that was of use. Where nothing is computed twice they are the same. A test holds all of it to the
matrix multiplications that torch makes.

The peak is that of all devices together, so a bubble of the pipeline or a slow rank lowers both. Not counted as
hardware work: the router that every tensor-parallel rank computes for itself under dispatch mode R, padding, and what
is not a matrix multiplication. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from skymoe.base.errors import ConfigError
from skymoe.spec.flops import AttentionCount, Flops, flops_per_token
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
    spec: ModelSpec, sequence_length: int, recomputed: Iterable[int | Half] = (), statistics_pass: bool = False
) -> TrainingFlops:
    """What a token of a training step costs.

    Args:
        spec: the model.
        sequence_length: T, in tokens.
        recomputed: what is run again in the backward pass: whole layers by number, and halves by themselves where a
            layer is cut (`recomputed_parts` of a layout). What occurs twice counts once.
        statistics_pass: whether the balance loss runs a forward pass of its own (several micro-batches, statistics of
            the global batch).

    Raises:
        ConfigError: `sequence_length` is not positive, or a layer is not in the model.
    """
    parts = set(recomputed)
    if wrong := sorted({_layer(part) for part in parts} - set(range(spec.num_layers))):
        raise ConfigError(f"layers {wrong} are recomputed, the model has {spec.num_layers}", where="recompute")
    model, hardware = [], []
    for convention in (AttentionCount.CAUSAL, AttentionCount.FULL):
        forward = flops_per_token(spec, sequence_length, attention=convention)
        again = sum(_again(spec, forward, part) for part in parts)
        statistics = sum(forward.layers) if statistics_pass else 0.0
        model.append(3 * forward.total)
        hardware.append(3 * forward.total + again + statistics)
    return TrainingFlops(
        model_causal=model[0], model_full=model[1], hardware_causal=hardware[0], hardware_full=hardware[1]
    )


def recomputed_parts(layout: Layout) -> tuple[int | Half, ...]:
    """What `layout` runs again, over all stages in the order of the model: whole layers, and halves of cut ones."""
    parts: list[int | Half] = []
    for stage in range(layout.num_stages):
        layers = [half.layer for half in layout.halves(stage)]
        again = layout.recomputed_layers(stage)
        for half in layout.halves(stage):
            if half.layer in again:
                parts.append(half.layer if layers.count(half.layer) == 2 else half)
    return tuple(dict.fromkeys(parts))


def utilisation(flops: TrainingFlops, tokens_per_second: float, peak_flops_per_second: float) -> Utilisation:
    """MFU and HFU of all devices together: `tokens_per_second` of the world against the sum of their peaks."""
    rate = tokens_per_second / peak_flops_per_second
    return Utilisation(
        mfu_causal=flops.model_causal * rate, mfu_full=flops.model_full * rate, hfu=flops.hardware_causal * rate
    )


def _layer(part: int | Half) -> int:
    return part.layer if isinstance(part, Half) else part


def _again(spec: ModelSpec, forward: Flops, part: int | Half) -> float:
    """FLOPs per token of the second run of `part`, up to the last tensor that its backward pass needs."""
    layer = _layer(part)
    if isinstance(part, Half) and part.is_attention:
        return forward.attention[layer] - 2 * spec.num_heads * spec.head_dim * spec.hidden_size
    ffn = forward.ffn[layer] - (0 if spec.is_moe_layer(layer) else 2 * spec.ffn_size * spec.hidden_size)
    return ffn if isinstance(part, Half) else forward.attention[layer] + ffn
