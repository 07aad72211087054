"""Hostile FP8 weights: scales that are missing, of another shape, no numbers; codes that are none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from faults.hostile_tools import (
    CONFIG,
    WEIGHTS,
    Build,
    Case,
    edit_json,
)
from safetensors.torch import load_file, save_file

NORM = "model.norm.weight"
Tensors = dict[str, torch.Tensor]
QUANTIZED = "model.layers.0.mlp.up_proj.weight"
SCALE = f"{QUANTIZED}_scale_inv"


def tensors(change: Callable[[Tensors], object]) -> Build:
    def make(directory: Path) -> None:
        found = load_file(directory / WEIGHTS)
        change(found)
        save_file(found, directory / WEIGHTS)

    return make


def fp8(change: Callable[[Tensors], object], *says: str, refused: str = "model") -> Case:
    return Case(tensors(change), "fp8", refused, says)


def scale(value: float, *says: str) -> Case:
    return fp8(lambda found: found[SCALE].fill_(value), QUANTIZED, *says, refused="values")


def not_a_number_code(found: Tensors) -> None:
    found[QUANTIZED].view(torch.uint8)[3, 5] = 0x7F


def as_e5m2(found: Tensors) -> None:
    found[QUANTIZED] = found[QUANTIZED].float().to(torch.float8_e5m2)


def quantization(**fields: Any) -> Case:
    return Case(edit_json(CONFIG, lambda config: config["quantization_config"].update(fields)), "fp8", "model")


FP8 = {
    "scale missing": fp8(lambda found: found.pop(SCALE), QUANTIZED),
    "scale alone": fp8(lambda found: found.pop(QUANTIZED), "FP8"),
    "scale of the wrong shape": fp8(lambda found: found.update({SCALE: torch.ones(3, 7)}), QUANTIZED),
    "scale transposed": fp8(lambda found: found.update({SCALE: found[SCALE].T.contiguous()}), QUANTIZED),
    "scale empty": fp8(lambda found: found.update({SCALE: torch.ones(0, 1)}), QUANTIZED),
    "scale of integers": fp8(lambda found: found.update({SCALE: found[SCALE].int()}), QUANTIZED),
    "scale NaN": scale(torch.nan),
    "scale infinite": scale(torch.inf),
    "scale negative": scale(-1.0),
    "scale zero": scale(0.0),
    "scale of 1e38": scale(3e38),
    "scale of a plain weight": fp8(lambda found: found.update({f"{NORM}_scale_inv": torch.ones(1)}), NORM),
    "codes NaN": fp8(not_a_number_code, QUANTIZED, refused="values"),
    "codes E5M2": fp8(as_e5m2, QUANTIZED),
    "codes of the norm": fp8(lambda found: found.update({NORM: found[NORM].to(torch.float8_e4m3fn)}), NORM),
    "no quantization_config": Case(
        edit_json(CONFIG, lambda config: (config.pop("quantization_config"), None)[1]), "fp8", "maybe"
    ),
    "another method": quantization(quant_method="gptq"),
    "blocks of another size": quantization(weight_block_size=[64, 64]),
    "blocks of zero in FP8": quantization(weight_block_size=[0, 0]),
    "blocks of 2^62 in FP8": quantization(weight_block_size=[2**62, 2**62]),
    "blocks of one number": quantization(weight_block_size=[128]),
}
