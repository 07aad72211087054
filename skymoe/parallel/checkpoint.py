"""Every rank writes its pieces into one generation, and every rank reads what it needs from one that any layout wrote.

    save    rank 0     clears what a kill left, asks for the space of all ranks, makes the staging directory
            everybody  writes, hashes and fsyncs its own files
            rank 0     receives what the manifest says of them, checks that the pieces make up whole tensors, publishes
    load    rank 0     lists the generations, newest first
            everybody  verifies its share of the files; the first generation that is intact on all ranks is taken by all

Each part ends in an agreement: all ranks go on, or all raise the same error, which names the rank (`together`). A rank
that dies leaves the others waiting in a collective, which fails within the time-out of the group. Then, and after a
kill at any moment, the generations from before are untouched, and the next save clears the staging directory away.

All ranks must see one file system. Left out: a save in which dead ranks are replaced; the run resumes instead.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import TypeAdapter

from skymoe.base.errors import CheckpointError, MachineError, SkymoeError
from skymoe.base.log import logger
from skymoe.parallel.agree import agree
from skymoe.parallel.mesh import Mesh
from skymoe.parallel.texts import broadcast_bytes, gather_bytes
from skymoe.parallel.together import fail_together, together
from skymoe.weights.generation import Generation, describe_problems, document_texts
from skymoe.weights.hashed import TensorsToSave, pieces_to_save
from skymoe.weights.hashing import write_texts
from skymoe.weights.listing import Listed, Problem, list_generations
from skymoe.weights.manifest import MANIFEST_NAME, FileRecord, read_manifest
from skymoe.weights.pieces import SavedPiece, by_file
from skymoe.weights.publish import discard, save_errors
from skymoe.weights.staged import estimate_bytes, open_staging, publish_staged
from skymoe.weights.verify import check_contents, check_cover, check_files, cover_problems

_RECORDS = TypeAdapter(dict[str, FileRecord])


def save_generation_distributed(
    root: Path,
    step: int,
    pieces: Iterable[SavedPiece],
    documents: Mapping[str, Any],
    mesh: Mesh,
    layout_document: Mapping[str, Any],
    keep: int = 3,
) -> Path:
    """Publish the state of `step` under `root`; every rank calls it and gets the directory.

    Args:
        root: directory of the generations, on storage that all ranks share.
        step: training step.
        pieces: of this rank; over all ranks they cover every tensor exactly once.
        documents: file stem ("state") -> what JSON can hold; those of rank 0 are written.
        mesh: the ranks.
        layout_document: how the tensors are divided, for the manifest (`weights.division.layout_document`).
        keep: how many generations stay.

    Raises:
        MachineError, FormatError, CheckpointError: on all ranks the same. Nothing is left behind.
    """
    save = open_save(root, step, pieces, documents, mesh)
    return close_save(save, write_save(save), mesh, layout_document, keep)


@dataclass(frozen=True)
class OpenSave:
    """A save that has its directory, and what this rank will put there."""

    root: Path
    step: int
    staging: Path
    files: Mapping[str, TensorsToSave]
    texts: Mapping[str, bytes]


def open_save(
    root: Path, step: int, pieces: Iterable[SavedPiece], documents: Mapping[str, Any], mesh: Mesh
) -> OpenSave:
    """The first part: a staging directory with room for the files of all ranks. Every rank calls it."""
    alone = mesh.world.handle is None

    def plan() -> tuple[dict[str, TensorsToSave], dict[str, bytes]]:
        contents = by_file(pieces, None if alone else mesh.rank)
        metadata = {"format": "pt", "step": str(step)}
        files = {name: pieces_to_save(content, metadata, alone=alone) for name, content in contents.items()}
        return files, document_texts(documents) if mesh.rank == 0 else {}

    files, texts = together(mesh, plan)
    data = sum(file.header.num_bytes for file in files.values()) + sum(map(len, texts.values()))
    num_bytes = _total(estimate_bytes(data, sum(len(file.header.tensors) for file in files.values())), mesh)
    staged = together(mesh, lambda: open_staging(root, step, num_bytes) if mesh.rank == 0 else root)
    staging = root / broadcast_bytes(staged.name.encode(), mesh.world, mesh.device).decode()
    try:
        together(mesh, lambda: _must_see(staging), undo=lambda: _give_up(staging, mesh))
    except BaseException:
        _give_up(staging, mesh)
        raise
    return OpenSave(root, step, staging, files, texts)


def write_save(save: OpenSave) -> dict[str, FileRecord] | Exception:
    """The second part: this rank's files, or the reason why they are not there. No communication: any thread may."""
    try:
        with save_errors(save.root):
            records = {name: file.write(save.staging / name) for name, file in save.files.items()}
            return records | write_texts(save.staging, save.texts)
    except Exception as error:
        return error


def close_save(
    save: OpenSave,
    written: dict[str, FileRecord] | Exception,
    mesh: Mesh,
    layout_document: Mapping[str, Any],
    keep: int,
) -> Path:
    """The third part: publish, or fail together. Every rank calls it."""

    def undo() -> None:
        _give_up(save.staging, mesh)

    try:
        fail_together(mesh, written if isinstance(written, Exception) else None, undo=undo)
        assert not isinstance(written, Exception)
        gathered = gather_bytes(_RECORDS.dump_json(written), mesh.world, mesh.device)

        def publish() -> Path:
            records = {name: record for text in gathered for name, record in _RECORDS.validate_json(text).items()}
            if problems := cover_problems(save.staging, records):
                raise CheckpointError(f"the ranks did not save everything: {describe_problems(problems)}")
            return publish_staged(
                save.root, save.staging, records,
                step=save.step, layout=layout_document, torch=torch.__version__, keep=keep,
            )  # fmt: skip

        final = together(mesh, lambda: publish() if mesh.rank == 0 else save.staging, undo=undo)
    except BaseException:  # also when the others are gone
        undo()
        raise
    return final if mesh.rank == 0 else save.root / save.staging.name.partition(".")[0]


def latest_generation_distributed(root: Path, mesh: Mesh) -> Generation | None:
    """The newest generation that is intact on every rank, None when nothing was ever saved. Every rank calls it.

    Each rank reads and compares its share of the files, about the same number of bytes; where one finds damage, all
    fall back to the generation before, and `skipped` says so.

    Raises:
        CheckpointError: there are generations and not one is intact; on all ranks the same.
    """
    listed = list_generations(root) if mesh.rank == 0 else None
    own = listed.generations if listed else ()
    offer = {
        "names": [(one.path.name, one.manifest_sha256) for one in own],
        "skipped": [(problem.file, problem.what) for problem in listed.problems] if listed else [],
    }
    offer = json.loads(broadcast_bytes(json.dumps(offer).encode(), mesh.world, mesh.device))
    skipped: list[tuple[str, str]] = [(file, what) for file, what in offer["skipped"]]
    by_name = {one.path.name: one for one in own}
    for name, digest in offer["names"]:
        one, problems = _verify_share(root / name, digest, by_name.get(name), mesh)
        reason = agree(not problems, describe_problems(problems) if problems else "", mesh.world, mesh.device)
        if reason is None:
            assert one.manifest is not None
            return Generation(one.path, one.step, one.manifest, tuple(skipped))
        if mesh.rank == 0:
            logger.warning("checkpoint %s is damaged and not used: %s", name, reason)
        skipped.append((name, reason))
    if not skipped:
        return None
    why = "; ".join(f"{name}: {reason}" for name, reason in skipped[:5])
    hint = "restore a copy, or choose a new run directory to start over"
    raise CheckpointError("no checkpoint here is intact", where=root, why=why, hint=hint)


def _verify_share(path: Path, digest: str, listed: Listed | None, mesh: Mesh) -> tuple[Listed, list[Problem]]:
    """Rank 0 looks at lineage, cover and sizes; each rank reads its share."""
    try:
        manifest, own_digest = read_manifest(path)
        one = Listed(path, manifest.step, manifest, own_digest, ())
        if own_digest != digest:
            return one, [Problem(MANIFEST_NAME, "", f"rank {mesh.rank} sees another one than rank 0")]
        problems = list(listed.problems) or check_cover(one) + check_files(one) if listed else []
        if problems:
            return one, problems
        return one, check_contents(one, _share(manifest.files, mesh.rank, mesh.world.size))
    except (OSError, SkymoeError) as error:
        what = error.what if isinstance(error, SkymoeError) else str(error)
        return Listed(path, 0, None, "", ()), [Problem(MANIFEST_NAME, "", what)]


def _share(files: Mapping[str, FileRecord], rank: int, size: int) -> list[str]:
    """Files of about the same number of bytes for every rank: the largest first, each to who has least."""
    loads = [(0, other) for other in range(size)]
    mine = []
    for name in sorted(files, key=lambda name: (-files[name].bytes, name)):
        load, other = heapq.heappop(loads)
        heapq.heappush(loads, (load + files[name].bytes, other))
        if other == rank:
            mine.append(name)
    return mine


def _total(count: int, mesh: Mesh) -> int:
    if mesh.world.handle is None:
        return count
    number = torch.tensor([count], dtype=torch.int64, device=mesh.device)
    dist.all_reduce(number, group=mesh.world.handle)
    return int(number.item())


def _must_see(staging: Path) -> None:
    with save_errors(staging):
        is_seen = staging.is_dir()
    if not is_seen:
        raise MachineError(
            "does not see the directory that rank 0 has made for the checkpoint",
            where=staging,
            hint="the run directory must be on storage that all hosts share",
        )


def _give_up(staging: Path, mesh: Mesh) -> None:
    if mesh.rank == 0:
        discard(staging)
