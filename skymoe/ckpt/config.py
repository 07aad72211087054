"""What the user asks of `skymoe ckpt ls|verify|diff`."""

from __future__ import annotations

from pathlib import Path

from skymoe.base.config import Config


class LsConfig(Config):
    """List the generations of a run.

    Attributes:
        path: a run directory, or its `checkpoints` folder.
    """

    path: Path


class VerifyConfig(Config):
    """Read everything and compare it with its hashes.

    Attributes:
        path: a generation, a `checkpoints` folder, a run directory, or a model directory (form only: it has no hashes).
    """

    path: Path


class DiffConfig(Config):
    """Compare two states, tensor by tensor.

    Attributes:
        left: a generation, a run directory or `checkpoints` folder (its newest generation), or a model directory.
        right: the same.
        circumstances: keys of JSON documents that may differ between equal states, as shell patterns. Clocks, the
            recipe (which names the run directory) and the machine are not state; everything else is.
    """

    left: Path
    right: Path
    circumstances: tuple[str, ...] = (
        "*.seconds",
        "recipe",
        "torch",
        "threads",
        "transformers_version",
        "_name_or_path",
    )
