"""GPU hours from a rate: given, foretold by a plan, or by an assumed share of the peak. The origin is always said."""

from __future__ import annotations

from pathlib import Path

from skymoe.base.errors import ConfigError, FormatError
from skymoe.plan.guide.config import GuideConfig
from skymoe.plan.guide.facts import FROM_SCRATCH_FROM
from skymoe.plan.guide.result import Compute, Cost
from skymoe.plan.hardware.catalogue import find_gpu
from skymoe.plan.hardware.gpu import Precision
from skymoe.spec.plan_file import read_plan

ASSUMED_MFU = 0.32
"""Causal FLOPs over the peak: what 690 tokens/s per A800 of Skywork-MoE are (32.3 %)."""


def cost_of(config: GuideConfig, compute: Compute) -> Cost | None:
    """None when nothing says how fast the machine is."""
    rate = _rate(config, compute)
    if rate is None:
        return None
    tokens_per_s, origin = rate
    hours = config.moe_tokens / tokens_per_s / 3600
    dense_hours = config.dense_tokens / (tokens_per_s * compute.ratio) / 3600
    return Cost(
        tokens_per_s_per_gpu=tokens_per_s,
        origin=origin,
        gpu_hours=hours,
        days=None if config.gpus is None else hours / config.gpus / 24,
        dense_gpu_hours=dense_hours,
        from_scratch_gpu_hours=FROM_SCRATCH_FROM * dense_hours,
    )


def _rate(config: GuideConfig, compute: Compute) -> tuple[float, str] | None:
    if config.tokens_per_s_per_gpu is not None:
        return config.tokens_per_s_per_gpu, "given"
    if config.layout_from is not None:
        return _planned_rate(config.layout_from), "foretold by the plan file"
    if config.gpu is None:
        return None
    gpu = find_gpu(config.gpu)
    if compute.moe_flops is None:
        raise ConfigError(
            "a GPU alone gives no rate: what does a token cost?", where="gpu", hint="--model, or --tokens-per-s-per-gpu"
        )
    share, peak = config.mfu or ASSUMED_MFU, gpu.peak.get(Precision.BF16, max(gpu.peak.values()))
    why = "given" if config.mfu else "assumed: that of Skywork-MoE on 1536 A800, 690 tokens/s, by causal FLOPs"
    return share * peak / compute.moe_flops, f"MFU {share:.0%} of {peak / 1e12:.0f} TFLOP/s ({why})"


def _planned_rate(path: Path) -> float:
    rate = read_plan(path).expected.get("tokens_per_s_per_gpu")
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate <= 1e9:
        raise FormatError(
            "this plan foretells no tokens_per_s_per_gpu", where=path, hint="skymoe plan train --save writes one"
        )
    return float(rate)
