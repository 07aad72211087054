"""Saving and loading the state of a run as checkpoint generations.

    save_generation(root, step, tensors={"model": ..., "optimizer": ...}, documents={"state": ...}, layout={})
    generation = latest_generation(root)
    generation.tensors("model"), generation.document("state"), generation.skipped

The SHA-256 in the manifest is taken from the memory that is saved, while it is written: a disk that stores something
else is found out. (Hashing what was read back would call a wrong write good.) Loading verifies every byte before it is
used, and once more the very memory it hands out. A flipped bit loads silently through safetensors, torch.load and
torch's distributed checkpoints alike. Layout and crash safety: `manifest` and `publish`. Safetensors and JSON only.

Left out: several writers of one generation, which come with parallel training; the manifest's slices await them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skymoe.base.errors import CheckpointError
from skymoe.base.log import logger
from skymoe.base.space import ensure_free_space
from skymoe.weights.buffers import bytes_of, empty
from skymoe.weights.hashed import TensorsToSave, write_files, write_synced
from skymoe.weights.header import TensorFile
from skymoe.weights.listing import Listing, Problem, find_generation, list_generations
from skymoe.weights.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Latest,
    Manifest,
    generation_name,
    sealed,
)
from skymoe.weights.publish import discard, publish, retire, save_errors, staging_path, tidy
from skymoe.weights.verify import verify_generation, verify_listed

__all__ = [
    "Generation",
    "latest_generation",
    "list_generations",
    "load_generation",
    "save_generation",
    "verify_generation",
]

_STEM = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,100}")
_MANIFEST_BYTES_PER_TENSOR = 700


def save_generation(
    root: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    documents: Mapping[str, Any],
    layout: Mapping[str, Any],
    keep: int = 3,
) -> Path:
    """Publish the state of `step` under `root` and return its directory. A step saved before is replaced.

    When this returns, the generation is on the disk; until then the one before it is untouched.

    Args:
        root: created when missing.
        step: training step, >= 0.
        tensors: file stem ("model") -> tensor name -> tensor, on any device.
        documents: file stem ("state") -> what JSON can hold (tuples return as lists).
        layout: how the tensors are divided over ranks, for the manifest.
        keep: how many generations stay, at least 1.

    Raises:
        MachineError: no space, no permission, an I/O error. Nothing is left behind.
        FormatError: a tensor of a type or name that safetensors files cannot hold.
    """
    assert step >= 0 and keep >= 1 and all(_STEM.fullmatch(stem) for stem in (*tensors, *documents))
    files = {
        f"{stem}.safetensors": TensorsToSave(content, {"format": "pt", "step": str(step)})
        for stem, content in tensors.items()
    }
    texts = {f"{stem}.json": json.dumps(content).encode() for stem, content in documents.items()}
    assert MANIFEST_NAME not in texts
    final = root / generation_name(step)
    with save_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        tidy(root)
        ensure_free_space(root, _estimate(files, texts))
        listing = list_generations(root)
        staging = staging_path(final)
        try:
            staging.mkdir()
            records = write_files(staging, files, texts)
            manifest = _manifest(step, listing, records, layout)
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


@dataclass(frozen=True)
class Generation:
    """A verified generation.

    Attributes:
        path: its directory.
        step: training step.
        manifest: what it holds.
        skipped: newer ones that were damaged and passed over: (directory, reason).
    """

    path: Path
    step: int
    manifest: Manifest
    skipped: tuple[tuple[str, str], ...] = ()

    def tensors(self, stem: str) -> dict[str, Tensor]:
        """All tensors of file `stem`, on the CPU, each compared with its hash.

        Raises:
            CheckpointError: no such file, or it has been damaged since it was verified.
        """
        name = f"{stem}.safetensors"
        records = self._record(name).tensors
        with TensorFile(self.path / name) as file, ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            if file.header.tensors.keys() != records.keys():
                raise CheckpointError("damaged: these are not the tensors of the manifest", where=file.path)
            loaded = pool.map(lambda tensor: _load_tensor(file, tensor, records[tensor].sha256), records)
            return dict(zip(records, loaded, strict=True))

    def document(self, stem: str) -> Any:
        """The content of JSON file `stem`. Raises CheckpointError as `tensors` does."""
        name = f"{stem}.json"
        record, raw = self._record(name), (self.path / name).read_bytes()
        if hashlib.sha256(raw).hexdigest() != record.sha256:
            raise CheckpointError("damaged: the file does not match its hash", where=self.path / name)
        return json.loads(raw)

    def _record(self, name: str) -> FileRecord:
        if name not in self.manifest.files:
            raise CheckpointError(f"this checkpoint holds no {name}", where=self.path)
        return self.manifest.files[name]


def latest_generation(root: Path, *, max_step: int | None = None) -> Generation | None:
    """The newest intact generation under `root`, None when nothing was ever saved there.

    Every byte is verified, from the newest generation to older ones until one is intact; what was passed over is logged
    and in `skipped`.

    Args:
        root: directory of the generations.
        max_step: take none of a later step (for a rollback).

    Raises:
        CheckpointError: there are generations and not one is intact. Starting over silently would be worse.
    """
    listing = list_generations(root)
    skipped = [(problem.file, problem.what) for problem in listing.problems]
    for one in listing.generations:
        if max_step is not None and one.step > max_step:
            continue
        problems = verify_listed(one)
        if one.manifest and not problems:
            return Generation(one.path, one.step, one.manifest, tuple(skipped))
        reason = _reason(problems)
        logger.warning("checkpoint %s is damaged and not used: %s", one.path.name, reason)
        skipped.append((one.path.name, reason))
    if not skipped:
        return None
    why = "; ".join(f"{name}: {reason}" for name, reason in skipped[:5])
    hint = "restore a copy, or choose a new run directory to start over"
    raise CheckpointError("no checkpoint here is intact", where=root, why=why, hint=hint)


def load_generation(path: Path) -> Generation:
    """The generation at `path`, verified. Raises CheckpointError, naming file and tensor, when it is damaged."""
    one = find_generation(path)
    problems = verify_listed(one)
    if problems or one.manifest is None:
        raise CheckpointError(f"the checkpoint is damaged: {_reason(problems)}", where=path)
    return Generation(path, one.step, one.manifest)


def _manifest(step: int, listing: Listing, files: Mapping[str, FileRecord], layout: Mapping[str, Any]) -> Manifest:
    parent = listing.newest
    return Manifest(
        step=step,
        serial=parent.serial + 1 if parent else 0,
        run=listing.run or secrets.token_hex(16),
        parent=parent,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        created_by=_created_by(),
        torch=torch.__version__,
        layout=dict(layout),
        files=dict(files),
    )


def _created_by() -> str:
    try:
        return f"skymoe {metadata.version('skymoe')}"
    except metadata.PackageNotFoundError:  # run from a source tree
        return "skymoe"


def _estimate(files: Mapping[str, TensorsToSave], texts: Mapping[str, bytes]) -> int:
    """Bytes a save takes, its manifest included (generously)."""
    data = sum(plan.header.num_bytes for plan in files.values()) + sum(map(len, texts.values()))
    return data + _MANIFEST_BYTES_PER_TENSOR * sum(len(plan.tensors) for plan in files.values()) + 2**16


def _load_tensor(file: TensorFile, name: str, sha256: str) -> Tensor:
    tensor = empty(file.header.tensors[name])
    data = bytes_of(tensor)
    file.read_into(name, data)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CheckpointError(f"damaged: tensor {name} does not match its hash", where=file.path)
    return tensor


def _reason(problems: list[Problem]) -> str:
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{problems[0]}{more}"
