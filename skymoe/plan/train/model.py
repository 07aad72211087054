"""The model to plan for, from a preset's name or a Hugging Face directory. Its weights are not read."""

from __future__ import annotations

from pathlib import Path

from skymoe.base.errors import FormatError
from skymoe.spec.hf import spec_from_directory
from skymoe.spec.model import ModelSpec
from skymoe.spec.presets import PRESETS, preset

MOST_SEQUENCE = 8192
"""Tokens of a sequence where nothing else is asked: contexts of today are longer than pretraining sequences."""


def read_model(name: str) -> ModelSpec:
    """A preset wins over a directory of the same name, which can be given as `./name`.

    Raises:
        ConfigError, FormatError: neither a preset nor a readable model directory.
    """
    if name in PRESETS:
        return preset(name)
    if Path(name).is_dir():
        return spec_from_directory(Path(name))
    if "/" in name:
        raise FormatError("there is no such model directory", where=name, hint=f"presets: {', '.join(PRESETS)}")
    return preset(name)
