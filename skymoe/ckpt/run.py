"""`skymoe ckpt ls | verify | diff`. Print a report with `skymoe.ckpt.table.show`, or `report.as_json()`.

`reshard` and `export` have files of their own.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from skymoe.base.errors import FormatError
from skymoe.base.progress import progress
from skymoe.ckpt.config import DiffConfig, LsConfig, VerifyConfig
from skymoe.ckpt.diff import Readable, Side, compare_documents, compare_tensors, is_circumstance, open_sides
from skymoe.ckpt.places import find_root, is_generation, is_model
from skymoe.ckpt.result import DiffReport, GenerationRow, LsReport, VerifyProblem, VerifyReport
from skymoe.weights.index import ModelFiles
from skymoe.weights.listing import Listed, Problem, find_generation, list_generations
from skymoe.weights.publish import leftovers
from skymoe.weights.verify import check_files, verify_listed


def run_ls(config: LsConfig) -> LsReport:
    """The generations in `config.path`, newest first, without reading their tensors.

    Raises:
        CheckpointError: no checkpoints there.
    """
    root = find_root(config.path)
    listing = list_generations(root)
    newest = next((one.path for one in listing.generations if _quick_status(one) == "ok"), None)
    rows = tuple(_row(one, one.path == newest) for one in listing.generations)
    notes = [str(problem) for problem in listing.problems]
    notes += [f"{name}: left by an interrupted save; the next save clears it" for name in leftovers(root)]
    return LsReport(str(root), rows, tuple(notes))


def _row(one: Listed, newest: bool) -> GenerationRow:
    manifest = one.manifest
    return GenerationRow(
        name=one.path.name,
        step=one.step,
        created=manifest.created if manifest else "",
        num_bytes=manifest.num_bytes if manifest else 0,
        num_tensors=manifest.num_tensors if manifest else 0,
        newest=newest,
        status=_quick_status(one),
    )


def _quick_status(one: Listed) -> str:
    problems = list(one.problems) or check_files(one)
    return str(problems[0]) if problems else "ok"


def run_verify(config: VerifyConfig) -> VerifyReport:
    """Read every byte in `config.path` and compare it with its hash; of a model directory check the form.

    Raises:
        CheckpointError: neither checkpoints nor a model there.
    """
    path = config.path
    if is_model(path) and not is_generation(path):
        return _verify_model(path)
    if is_generation(path):
        return _verify_generations(path, (find_generation(path),), ())
    root = find_root(path)
    listing = list_generations(root)
    notes = [f"{name}: left by an interrupted save; the next save clears it" for name in leftovers(root)]
    report = _verify_generations(path, listing.generations, listing.problems)
    return replace(report, notes=tuple(notes))


def _verify_generations(path: Path, generations: tuple[Listed, ...], known: tuple[Problem, ...]) -> VerifyReport:
    problems = [VerifyProblem(problem.file, problem.tensor, problem.what) for problem in known]
    num_bytes = sum(one.manifest.num_bytes for one in generations if one.manifest)
    with progress("verify", num_bytes, "B") as bar:
        for one in generations:
            for found in verify_listed(one):
                file = f"{one.path.name}/{found.file}" if found.file else one.path.name
                problems.append(VerifyProblem(file, found.tensor, found.what))
            bar.advance(one.manifest.num_bytes if one.manifest else 0)
    checked = tuple(one.path.name for one in generations)
    return VerifyReport(str(path), checked, num_bytes, hashed=True, problems=tuple(problems), notes=())


def _verify_model(path: Path) -> VerifyReport:
    note = "a model directory holds no hashes: form, sizes and index were checked, not the values"
    try:
        with ModelFiles(path) as files:
            checked = tuple(file.path.name for file in files.files)
            num_bytes = sum(file.header.num_bytes for file in files.files)
    except FormatError as error:
        problem = VerifyProblem(Path(error.where).name, "", ": ".join(filter(None, (error.what, error.why))))
        return VerifyReport(str(path), (), 0, hashed=False, problems=(problem,), notes=(note,))
    return VerifyReport(str(path), checked, num_bytes, hashed=False, problems=(), notes=(note,))


def run_diff(config: DiffConfig) -> DiffReport:
    """Compare two states tensor by tensor and document by document.

    Raises:
        ConfigError: a model against a checkpoint.
        CheckpointError, FormatError: nothing to compare, or it is broken.
    """
    with ExitStack() as stack:
        left, right = open_sides(config.left, config.right, stack)
        tensors = list(compare_tensors(left, right))
        documents = list(compare_documents(left, right))
        num_bytes = sum(tensor.info.num_bytes for tensor in _shared(left, right))
    circumstances = [one for one in documents if is_circumstance(one, config.circumstances)]
    return DiffReport(
        left=str(left.path),
        right=str(right.path),
        num_tensors=len(_shared(left, right)),
        num_bytes=num_bytes,
        differences=(*tensors, *(one for one in documents if one not in circumstances)),
        circumstances=tuple(circumstances),
    )


def _shared(left: Side, right: Side) -> list[Readable]:
    return [left.tensors[name] for name in left.tensors.keys() & right.tensors.keys()]
