"""Rotary position embedding in the rotate-half convention of Hugging Face, with the Llama and Qwen scaling variants.

Sources: RoFormer (arXiv 2104.09864); linear interpolation (2306.15595); dynamic NTK (Reddit, u/emozilla); YaRN
(2309.00071); Llama 3.1's frequency bands. Tables are fp32.

Shapes: B batch, T tokens, H heads, C head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from skymoe.spec.model import RopeScaling, RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int, max_position: int, length: int = 0) -> tuple[Tensor, float]:
    """The angle per position of each pair of channels.

    Args:
        rope: the variant.
        head_dim: channels of a head (C).
        max_position: the model's context length.
        length: longest position + 1 of this batch; only `dynamic` looks at it.

    Returns:
        fp32 frequencies (C/2,), and the factor that multiplies cos and sin.
    """
    original = rope.original_max_position or max_position
    theta = rope.theta
    if rope.scaling is RopeScaling.DYNAMIC:
        stretch = rope.factor * max(length, original) / original - (rope.factor - 1)
        theta *= stretch ** (head_dim / (head_dim - 2))
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    match rope.scaling:
        case RopeScaling.LINEAR:
            return frequencies / rope.factor, 1.0
        case RopeScaling.LLAMA3:
            return _llama3(frequencies, rope, original), 1.0
        case RopeScaling.YARN:
            return _yarn(frequencies, rope, head_dim, original), _yarn_attention_factor(rope)
        case _:
            return frequencies, 1.0


def _llama3(frequencies: Tensor, rope: RopeSpec, original: int) -> Tensor:
    """Long wavelengths are divided by the factor, short ones kept, those between blended."""
    wavelength = 2 * math.pi / frequencies
    smooth = (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    result = frequencies.where(wavelength < original / rope.high_freq_factor, blended)
    return result.where(wavelength <= original / rope.low_freq_factor, frequencies / rope.factor)


def _yarn(frequencies: Tensor, rope: RopeSpec, head_dim: int, original: int) -> Tensor:
    """Channels that turn often are kept, those that turn less than once are interpolated, a ramp lies between."""

    def channel(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2).float() - low) / (high - low or 0.001)
    keep = 1 - ramp.clamp(0, 1)
    return frequencies / rope.factor * (1 - keep) + frequencies * keep


def _yarn_attention_factor(rope: RopeSpec) -> float:
    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


def rotary_tables(frequencies: Tensor, factor: float, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin for these positions, each (B, 1, T, C/2) fp32, ready for the halves of (B, H, T, C)."""
    angles = positions_BT[:, None, :, None].float() * frequencies
    return angles.cos() * factor, angles.sin() * factor


class _Rotate(torch.autograd.Function):
    """A rotation by each angle; its backward is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx, x_BHTC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x_BHTC, cos, sin)

    @staticmethod
    def backward(ctx, grad_BHTC: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad_BHTC, cos, -sin), None, None


def _rotate(x_BHTC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x_BHTC.to(torch.promote_types(x_BHTC.dtype, cos.dtype)).chunk(2, dim=-1)
    out = torch.empty_like(x_BHTC)
    out_first, out_second = out.chunk(2, dim=-1)
    out_first.copy_((first * cos).addcmul_(second, sin, value=-1))
    out_second.copy_((second * cos).addcmul_(first, sin))
    return out


def apply_rotary(x_BHTC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of channels (c, c + C/2) by its angle; computed in fp32 or wider, returned in `x.dtype`."""
    return _Rotate.apply(x_BHTC, cos, sin)
