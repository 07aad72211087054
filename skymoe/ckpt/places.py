"""What a path on the command line means: one generation, a folder of them (also through its run), or a model."""

from __future__ import annotations

from pathlib import Path

from skymoe.base.errors import CheckpointError
from skymoe.weights.index import INDEX_NAME, SINGLE_NAME
from skymoe.weights.listing import Listed, find_generation, list_generations
from skymoe.weights.manifest import LATEST_NAME, MANIFEST_NAME
from skymoe.weights.publish import leftovers

CHECKPOINTS = "checkpoints"


def is_generation(path: Path) -> bool:
    """Whether `path` is one generation (perhaps a damaged one)."""
    return (path / MANIFEST_NAME).exists() or (path.absolute().name.startswith("step-") and path.is_dir())


def is_model(path: Path) -> bool:
    """Whether `path` looks like a model directory."""
    return any((path / name).exists() for name in (SINGLE_NAME, INDEX_NAME, "config.json"))


def find_root(path: Path) -> Path:
    """The folder of generations that `path` is or has. Raises CheckpointError when there is none."""
    if not path.is_dir():
        raise CheckpointError("there is no such directory", where=path)
    for root in (path / CHECKPOINTS, path):
        if (root / LATEST_NAME).exists() or list_generations(root).generations or leftovers(root):
            return root
    hint = f"name a run directory, its {CHECKPOINTS} folder or one step-... directory in it"
    raise CheckpointError("no checkpoints here", where=path, hint=hint)


def find_newest(path: Path) -> Listed:
    """The generation that `path` is, or the newest one under it whose manifest is in order. Raises CheckpointError."""
    if is_generation(path):
        return find_generation(path)
    root = find_root(path)
    newest = next((one for one in list_generations(root).generations if not one.problems), None)
    if newest is None:
        raise CheckpointError("no checkpoint here can be read", where=root, hint=f"skymoe ckpt verify {path}")
    return newest
