"""Saving and loading the state of a run as checkpoint generations.

    save_generation(root, step, tensors={"model": ..., "optimizer": ...}, documents={"state": ...}, layout={})
    generation = latest_generation(root)
    generation.tensors("model"), generation.document("state"), generation.skipped

The SHA-256 in the manifest is taken from the memory that is saved, while it is written: a disk that stores something
else is found out. (Hashing what was read back would call a wrong write good.) Loading verifies every byte before it is
used, and once more the very memory it hands out. A flipped bit loads silently through safetensors, torch.load and
torch's distributed checkpoints alike. Layout and crash safety: `manifest` and `publish`. Safetensors and JSON only.

This is the way of one process, which has everything. Many ranks save together by `parallel.checkpoint`; what they
wrote is read here as whole tensors all the same, and by boxes through `sliced`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skymoe.base.errors import CheckpointError
from skymoe.base.log import logger
from skymoe.weights.buffers import bytes_of, empty
from skymoe.weights.hashed import TensorsToSave
from skymoe.weights.hashing import write_texts
from skymoe.weights.listing import Problem, find_generation, list_generations
from skymoe.weights.manifest import MANIFEST_NAME, FileRecord, Manifest
from skymoe.weights.publish import discard, save_errors
from skymoe.weights.staged import estimate_bytes, open_staging, publish_staged
from skymoe.weights.stored import StoredTensor, catalogue, whole_box
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
    assert step >= 0 and keep >= 1 and all(_STEM.fullmatch(stem) for stem in tensors)
    files = {
        f"{stem}.safetensors": TensorsToSave(content, {"format": "pt", "step": str(step)})
        for stem, content in tensors.items()
    }
    texts = document_texts(documents)
    data = sum(file.header.num_bytes for file in files.values()) + sum(map(len, texts.values()))
    staging = open_staging(root, step, estimate_bytes(data, sum(len(file.header.tensors) for file in files.values())))
    with save_errors(root):
        try:
            records = {name: file.write(staging / name) for name, file in files.items()}
            records |= write_texts(staging, texts)
        except BaseException:
            discard(staging)
            raise
    return publish_staged(root, staging, records, step=step, layout=layout, torch=torch.__version__, keep=keep)


def document_texts(documents: Mapping[str, Any]) -> dict[str, bytes]:
    """JSON documents by stem as files."""
    assert all(_STEM.fullmatch(stem) for stem in documents)
    texts = {f"{stem}.json": json.dumps(content).encode() for stem, content in documents.items()}
    assert MANIFEST_NAME not in texts
    return texts


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
        """All whole tensors of `stem` ("model"), on the CPU; each piece of one is compared with its hash.

        Raises:
            CheckpointError: no such file, or it has been damaged since it was verified.
        """
        stored = self.stored.get(stem)
        if stored is None:
            raise CheckpointError(f"this checkpoint holds no {stem}.safetensors", where=self.path)
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            return dict(zip(stored, pool.map(load_whole, stored.values()), strict=True))

    @cached_property
    def stored(self) -> dict[str, dict[str, StoredTensor]]:
        """Where the pieces of each whole tensor are: file stem -> name -> tensor."""
        return catalogue(self.path, self.manifest.files)

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
        reason = describe_problems(problems)
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
        raise CheckpointError(f"the checkpoint is damaged: {describe_problems(problems)}", where=path)
    return Generation(path, one.step, one.manifest)


def load_whole(stored: StoredTensor) -> Tensor:
    """A whole tensor in new memory, on the CPU. Raises CheckpointError when a piece does not match its hash."""
    tensor = empty(stored.info)
    stored.read_into(whole_box(stored.info.shape), bytes_of(tensor))
    return tensor


def describe_problems(problems: list[Problem]) -> str:
    """The first of them, and how many more."""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{problems[0]}{more}"
