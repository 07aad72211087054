"""Which checkpoint generations are there, in which order, do they belong together? Only manifests are read. No torch.

The order is that of publication (`serial`). Three things give away a generation that does not belong: a step other than
its directory's, another `run` than `LATEST`, and a manifest that is not the one `LATEST` or its own successor saw
published (an older or foreign copy put in its place).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from skymoe.base.errors import CheckpointError, printable
from skymoe.weights.manifest import LATEST_NAME, MANIFEST_NAME, Latest, Manifest, Parent, read_latest, read_manifest

_GENERATION = re.compile(r"step-(\d{8,19})(?:\.old-[0-9a-f]+)?")  # `.old-`: being replaced, and still whole


@dataclass(frozen=True)
class Problem:
    """Something in a generation that is not as it was saved.

    Attributes:
        file: its name, or "" for the directory.
        tensor: the damaged tensor, or "" when it is not known or the file has none.
        what: what is wrong.
    """

    file: str
    tensor: str
    what: str

    def __str__(self) -> str:
        """`file: tensor: what`."""
        return ": ".join(printable(part) for part in (self.file, self.tensor, self.what) if part)


@dataclass(frozen=True)
class Listed:
    """A generation's directory and its manifest, files unread.

    Attributes:
        path: the directory.
        step: from its name.
        manifest: None when it is damaged.
        manifest_sha256: of its text, "" when it is damaged.
        problems: of the manifest, its step, run and serial.
    """

    path: Path
    step: int
    manifest: Manifest | None
    manifest_sha256: str
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class Listing:
    """What lies under a checkpoint root.

    Attributes:
        generations: newest first; the damaged among them where their step belongs.
        latest: what `LATEST` says; None when it is absent or damaged.
        problems: of `LATEST` itself.
    """

    generations: tuple[Listed, ...]
    latest: Latest | None
    problems: tuple[Problem, ...]

    @property
    def newest(self) -> Parent | None:
        """The generation published last, as the next one names it. It may be gone or damaged since."""
        last = self.latest
        published = [Parent(step=last.step, serial=last.serial, manifest_sha256=last.manifest_sha256)] if last else []
        for one in self.generations:
            if one.manifest and not one.problems:
                own = one.manifest
                published.append(Parent(step=own.step, serial=own.serial, manifest_sha256=one.manifest_sha256))
        return max(published, key=lambda parent: parent.serial, default=None)

    @property
    def run(self) -> str:
        """The identity of the run that saves here, "" when it cannot be told."""
        if self.latest:
            return self.latest.run
        return next((one.manifest.run for one in self.generations if one.manifest and not one.problems), "")


def list_generations(root: Path) -> Listing:
    """The generations under `root` (none when there is no such directory). Only manifests are read."""
    problems, latest = [], None
    try:
        latest = read_latest(root)
    except CheckpointError as error:
        problems.append(Problem(LATEST_NAME, "", error.what))
    try:
        entries = sorted(os.listdir(root)) if root.is_dir() else []
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=root) from error
    found = [(root / name, int(match[1])) for name in entries if (match := _GENERATION.fullmatch(name))]
    listed = _check_lineage([_list_one(path, step) for path, step in found], latest)
    if latest and not any(one.path.name == latest.generation for one in listed):
        problems.append(Problem(LATEST_NAME, "", f"names {latest.generation}, which is not there"))
    return Listing(tuple(_newest_first(listed)), latest, tuple(problems))


def find_generation(path: Path) -> Listed:
    """The generation at `path`, checked against its neighbours. Raises CheckpointError when there is none."""
    path = path.absolute()
    if not path.is_dir():
        raise CheckpointError("there is no such checkpoint", where=path)
    if not _GENERATION.fullmatch(path.name):  # copied elsewhere under another name
        return _list_one(path, None)
    return next(one for one in list_generations(path.parent).generations if one.path == path)


def _list_one(path: Path, step: int | None) -> Listed:
    try:
        manifest, digest = read_manifest(path)
    except CheckpointError as error:
        return Listed(path, step or 0, None, "", (Problem(MANIFEST_NAME, "", error.what),))
    if step is not None and manifest.step != step:
        wrong = Problem(MANIFEST_NAME, "", f"is of step {manifest.step}, the directory says {step}")
        return Listed(path, step, manifest, digest, (wrong,))
    return Listed(path, manifest.step, manifest, digest, ())


def _check_lineage(listed: list[Listed], latest: Latest | None) -> list[Listed]:
    """Mark the generations of another run, and those that are not the ones their successors were made after."""
    if latest is None:
        return listed
    ours = [one.manifest for one in listed if one.manifest and one.manifest.run == latest.run]
    digests = {m.parent.serial: m.parent.manifest_sha256 for m in ours if m.parent}
    digests[latest.serial] = latest.manifest_sha256
    return [_check_one_lineage(one, latest, digests) for one in listed]


def _check_one_lineage(one: Listed, latest: Latest, digests: Mapping[int, str]) -> Listed:
    if one.manifest is None or one.problems:
        return one
    what = ""
    if one.manifest.run != latest.run:
        what = "belongs to another run than LATEST"
    elif digests.get(one.manifest.serial, one.manifest_sha256) != one.manifest_sha256 or (
        one.path.name == latest.generation and one.manifest.serial < latest.serial
    ):
        what = "is not the manifest that was published here: an older or foreign copy"
    return replace(one, problems=(Problem(MANIFEST_NAME, "", what),)) if what else one


def _newest_first(listed: list[Listed]) -> list[Listed]:
    """By serial, which only the readable ones have; the others go before the first older step."""
    readable = [one for one in listed if one.manifest and not one.problems]
    order = sorted(readable, key=lambda one: -one.manifest.serial if one.manifest else 0)
    for one in sorted((one for one in listed if one not in readable), key=lambda one: one.step):
        place = next((i for i, other in enumerate(order) if other.step <= one.step), len(order))
        order.insert(place, one)
    return order
