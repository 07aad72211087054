"""Is a generation what was saved? Every byte is read and compared. No torch.

A generation is intact when its manifest is, when it holds exactly the files the manifest lists, and when each has the
size and the SHA-256 listed. For a file that has not, the hashes of its tensors tell which one is damaged, so that the
message can name it.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from skymoe.base.errors import CheckpointError, FormatError, printable
from skymoe.weights.header import CHUNK_BYTES, TensorFile, TensorInfo
from skymoe.weights.listing import Listed, Problem, find_generation
from skymoe.weights.manifest import MANIFEST_NAME, FileRecord
from skymoe.weights.stored import catalogue, cover_problem


def verify_generation(path: Path) -> list[Problem]:
    """Everything wrong with the generation at `path`; an empty list means intact.

    Raises:
        CheckpointError: there is no such directory.
    """
    return verify_listed(find_generation(path))


def verify_listed(one: Listed) -> list[Problem]:
    """As `verify_generation`, for a manifest already read."""
    if one.manifest is None or one.problems:
        return list(one.problems)
    problems = check_cover(one) + check_files(one)
    spoiled = {problem.file for problem in problems}
    return problems + check_contents(one, [name for name in one.manifest.files if name not in spoiled])


def check_contents(one: Listed, names: Collection[str]) -> list[Problem]:
    """The slow part: every byte of these files. Many ranks divide them among themselves."""
    assert one.manifest is not None
    files = one.manifest.files
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda name: _check_content(one, name, files[name]), names)
        return [problem for problems in found for problem in problems]


def check_cover(one: Listed) -> list[Problem]:
    """Whether the pieces in the files make up whole tensors, each element once."""
    assert one.manifest is not None
    return cover_problems(one.path, one.manifest.files)


def cover_problems(directory: Path, files: Mapping[str, FileRecord]) -> list[Problem]:
    """As `check_cover`, before there is a manifest."""
    try:
        stored = catalogue(directory, files)
    except CheckpointError as error:
        return [Problem(MANIFEST_NAME, "", error.what)]
    tensors = [tensor for content in stored.values() for tensor in content.values()]
    wrong = [(tensor.name, cover_problem(tensor)) for tensor in tensors]
    return [Problem(MANIFEST_NAME, name, what) for name, what in wrong if what]


def check_files(one: Listed) -> list[Problem]:
    """The quick part: exactly the files of the manifest, of the sizes listed."""
    assert one.manifest is not None
    problems = []
    present = set(os.listdir(one.path))
    for name, record in one.manifest.files.items():
        state = (one.path / name).lstat() if name in present else None
        if state is None:
            problems.append(Problem(name, "", "the file is missing"))
        elif not stat.S_ISREG(state.st_mode):
            problems.append(Problem(name, "", "this is not a regular file"))
        elif (size := state.st_size) != record.bytes:
            what = "cut off: " if size < record.bytes else ""
            what += f"{size} bytes instead of {record.bytes}"
            problems.append(Problem(name, _first_cut(record, size), what))
    known = {MANIFEST_NAME, *one.manifest.files}
    problems += [Problem(name, "", "the manifest does not list this file") for name in sorted(present - known)]
    return problems


def _first_cut(record: FileRecord, size: int) -> str:
    """The first tensor that does not fit in `size` bytes."""
    by_offset = sorted(record.tensors, key=lambda name: record.tensors[name].offset)
    ends = [record.tensors[name].offset for name in by_offset[1:]] + [record.bytes]
    return next((name for name, end in zip(by_offset, ends, strict=False) if end > size), "")


def _check_content(one: Listed, name: str, record: FileRecord) -> list[Problem]:
    path = one.path / name
    try:
        if _sha256(path, 0, record.bytes) == record.sha256:
            return []
        foreign = _foreign_step(path, one.step)
        if foreign:
            return [Problem(name, "", foreign)]
        damaged = [t for t, (start, size) in _ranges(record) if _sha256(path, start, size) != record.tensors[t].sha256]
    except OSError as error:
        return [Problem(name, "", f"cannot be read: {error.strerror}")]
    if not damaged:
        return [Problem(name, "", "the header is damaged" if record.tensors else "does not match its hash")]
    return [Problem(name, tensor, "does not match its hash") for tensor in damaged]


def _foreign_step(path: Path, step: int) -> str:
    """Whether a tensor file is an intact one of another step."""
    try:
        with TensorFile(path) as file:
            found = file.header.metadata.get("step", "")
    except FormatError:
        return ""
    return f"is the file of step {printable(found, 20)}, not of step {step}" if found != str(step) else ""


def _ranges(record: FileRecord) -> Iterator[tuple[str, tuple[int, int]]]:
    for name, tensor in record.tensors.items():
        yield name, (tensor.offset, TensorInfo(tensor.dtype, tensor.shape).num_bytes)


def _sha256(path: Path, start: int, size: int) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(size, CHUNK_BYTES)))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while size and (count := file.readinto(buffer[: min(size, CHUNK_BYTES)])):
            digest.update(buffer[:count])
            size -= count
    return digest.hexdigest()
