"""Which model a name means: a preset, or a Hugging Face directory. A preset's name wins; `./name` is the directory."""

from __future__ import annotations

import difflib
from pathlib import Path

from skymoe.base.errors import FormatError
from skymoe.spec.hf import spec_from_directory
from skymoe.spec.model import ModelSpec
from skymoe.spec.presets import PRESETS


def preset_or_directory(name: str) -> ModelSpec | Path:
    """What `name` means.

    Raises:
        FormatError: neither a preset nor a directory; the message names the nearest preset, or all.
    """
    if name in PRESETS:
        return PRESETS[name]
    if Path(name).is_dir():
        return Path(name)
    near = difflib.get_close_matches(name[:100], PRESETS, n=1)
    hint = f"{near[0]}?" if near else f"presets: {', '.join(PRESETS)}"
    raise FormatError("there is no such model directory or preset", where=name, hint=hint)


def read_model(name: str) -> ModelSpec:
    """The spec of what `name` means. Weights are not read.

    Raises:
        FormatError: neither a preset nor a readable model directory.
    """
    found = preset_or_directory(name)
    return spec_from_directory(found) if isinstance(found, Path) else found
