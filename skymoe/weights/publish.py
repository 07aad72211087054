"""How a finished directory becomes the newest generation, so that a kill between any two steps loses nothing. No torch.

    write step-00000120.tmp-<id>/, every file pushed to the disk
    if step-00000120/ is there already (the run was rolled back): rename it to step-00000120.old-<id>, still readable
    rename the new one to step-00000120/, push the directory that holds the names
    replace LATEST in one rename
    remove what is superseded: `.old-`, what is beyond `keep`; set aside what is of a later step (an abandoned future)

Removing begins with a rename to `.tmp-<id>`, so a directory under a generation's name is always whole. Whatever a kill
leaves behind is `.tmp-`, `.stale-` or `.old-`; the next save clears it away. One writer per root: a second one would
clear the first one's work.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from skymoe.base.errors import MachineError
from skymoe.base.files import fsync_dir, write_atomic
from skymoe.base.log import logger
from skymoe.weights.listing import Listed, list_generations
from skymoe.weights.manifest import LATEST_NAME, Latest, sealed

_GARBAGE = re.compile(r"step-\d{8,19}\.(tmp|stale)-[0-9a-f]+|\.LATEST\.tmp-[0-9a-f]+")
_REPLACED = re.compile(r"(step-\d{8,19})\.old-[0-9a-f]+")


@contextmanager
def save_errors(root: Path) -> Iterator[None]:
    """Turn every failure of the operating system inside the block into a MachineError that says what it means."""
    try:
        yield
    except OSError as error:
        why = "the generations saved before are untouched"
        hint = "make space or fix the permissions, then save again"
        what = f"the checkpoint cannot be saved: {error.strerror}"
        raise MachineError(what, where=error.filename or root, why=why, hint=hint) from error


def leftovers(root: Path) -> list[str]:
    """Names of what a kill left under `root`; never loaded, cleared by the next save."""
    return sorted(name for name in os.listdir(root) if _GARBAGE.fullmatch(name)) if root.is_dir() else []


def tidy(root: Path) -> None:
    """Finish what a killed save left: a replaced generation without a successor gets its name back, the rest goes."""
    for name in sorted(os.listdir(root)):
        replaced = _REPLACED.fullmatch(name)
        if replaced and not (root / replaced[1]).exists():
            os.rename(root / name, root / replaced[1])
            fsync_dir(root)
        elif replaced:
            _remove(root / name)
        elif _GARBAGE.fullmatch(name):
            _erase(root / name)


def staging_path(final: Path) -> Path:
    """A fresh name beside `final` that is never taken for a generation."""
    return final.with_name(f"{final.name}.tmp-{secrets.token_hex(8)}")


def discard(staging: Path) -> None:
    """Remove a directory that was not published; a failure to do so is left to the next save."""
    shutil.rmtree(staging, ignore_errors=True)


def publish(staging: Path, final: Path, latest: Latest) -> None:
    """Give the finished directory `staging` its name `final` and let `LATEST` say so."""
    fsync_dir(staging)
    if final.exists():
        _rename_aside(final, "old")
    os.rename(staging, final)
    fsync_dir(final.parent)
    write_atomic(final.parent / LATEST_NAME, sealed(latest))


def retire(root: Path, newest: Path, *, keep: int) -> None:
    """Remove what `newest` supersedes, all but `keep` generations. Failures are logged: the new one is safe already.

    Generations of a later step are an abandoned future (the run was rolled back, or they were damaged): they are set
    aside, and cleared by the next save. What belongs to another run is not touched.
    """
    try:
        listed = list_generations(root).generations
        current = next(one.manifest for one in listed if one.path == newest and one.manifest)
        ours = [one for one in listed if one.manifest is None or one.manifest.run == current.run]
        for one in ours:
            if one.step > current.step:
                logger.info("set aside %s: it is of a later step than the one just saved", one.path.name)
                _rename_aside(one.path, "stale")
        for one in _superseded([one for one in ours if one.step <= current.step], keep):
            _remove(one.path)
    except OSError as error:
        logger.warning("old checkpoints could not be removed: %s", error)


def _superseded(newest_first: Sequence[Listed], keep: int) -> Iterator[Listed]:
    """The replaced ones, and all after the `keep` newest; one with a damaged manifest does not count as kept."""
    kept = 0
    for one in newest_first:
        if _REPLACED.fullmatch(one.path.name) or kept >= keep:
            yield one
        elif not one.problems:
            kept += 1


def _remove(directory: Path) -> None:
    _erase(_rename_aside(directory, "tmp"))


def _rename_aside(directory: Path, kind: str) -> Path:
    aside = directory.with_name(f"{directory.name.partition('.')[0]}.{kind}-{secrets.token_hex(8)}")
    os.rename(directory, aside)
    return aside


def _erase(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
