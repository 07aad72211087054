"""The two ends of a save: a staging directory with room for it, and its publication as the newest generation. No torch.

Between the two, one process or many ranks write their files into the directory. Until `publish_staged` returns, the
generations from before are untouched, and what is staged is taken for nothing.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from skymoe.base.space import ensure_free_space
from skymoe.weights.hashing import write_synced
from skymoe.weights.listing import list_generations
from skymoe.weights.manifest import MANIFEST_NAME, FileRecord, Latest, Manifest, generation_name, sealed
from skymoe.weights.publish import discard, publish, retire, save_errors, staging_path, tidy

_MANIFEST_BYTES_PER_TENSOR = 700


def estimate_bytes(data: int, num_tensors: int) -> int:
    """Bytes a save of so many bytes of files takes, its manifest included (generously)."""
    return data + _MANIFEST_BYTES_PER_TENSOR * num_tensors + 2**16


def open_staging(root: Path, step: int, num_bytes: int) -> Path:
    """A fresh directory under `root` for the files of `step`, with room for `num_bytes`. What a kill left is cleared.

    Raises:
        MachineError: no space, no permission.
    """
    with save_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        tidy(root)
        ensure_free_space(root, num_bytes)
        staging = staging_path(root / generation_name(step))
        staging.mkdir()
        return staging


def publish_staged(
    root: Path,
    staging: Path,
    files: Mapping[str, FileRecord],
    *,
    step: int,
    layout: Mapping[str, Any],
    torch: str,
    keep: int,
    run: str = "",
) -> Path:
    """Write the manifest of `files`, which are on the disk in `staging`, publish, and retire what is superseded.

    Args:
        root: directory of the generations.
        staging: from `open_staging`; removed when this fails.
        files: what was written there.
        step: of the generation.
        layout: how the tensors are divided over ranks, for the manifest.
        torch: the version that computed the state.
        keep: how many generations stay.
        run: identity of the run where `root` has none yet; drawn when empty.

    Raises:
        MachineError: an I/O error. The generations from before are untouched.
    """
    final = root / generation_name(step)
    with save_errors(root):
        try:
            manifest = _manifest(root, step, files, layout, torch, run)
            text = sealed(manifest)
            write_synced(staging / MANIFEST_NAME, text)
            digest = hashlib.sha256(text).hexdigest()
            latest = Latest(
                generation=final.name, step=step, serial=manifest.serial, run=manifest.run, manifest_sha256=digest
            )
            publish(staging, final, latest)
        except BaseException:
            discard(staging)
            raise
    retire(root, final, keep=keep)
    return final


def _manifest(
    root: Path, step: int, files: Mapping[str, FileRecord], layout: Mapping[str, Any], torch: str, run: str
) -> Manifest:
    listing = list_generations(root)
    parent = listing.newest
    in_pieces = any(tensor.whole is not None for file in files.values() for tensor in file.tensors.values())
    return Manifest(
        version=2 if in_pieces else 1,
        step=step,
        serial=parent.serial + 1 if parent else 0,
        run=listing.run or run or secrets.token_hex(16),
        parent=parent,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        created_by=_created_by(),
        torch=torch,
        layout=dict(layout),
        files=dict(files),
    )


def _created_by() -> str:
    try:
        return f"skymoe {metadata.version('skymoe')}"
    except metadata.PackageNotFoundError:  # run from a source tree
        return "skymoe"
