"""Runs every hostile directory through every job that reads models, in one process of bounded memory.

    python -c "from faults.hostile_jobs import main; main(scratch, answers)"

For each run one JSON line is written: what was raised, what it left behind, how much memory it took. The process has
little more address space than it needs for torch, so that an allocation the size of a hostile number fails.
"""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from faults.hostile_models import BASES, CASES, place
from faults.hostile_tools import SECRET, VICTIM, Case

from skymoe.base.errors import SkymoeError
from skymoe.compare.config import CompareConfig
from skymoe.compare.run import run as compare
from skymoe.export.config import ExportConfig, Format
from skymoe.export.run import run as export
from skymoe.generate.config import GenerateConfig
from skymoe.generate.run import run as generate
from skymoe.inspect.config import InspectConfig
from skymoe.inspect.run import run as inspect
from skymoe.model.load import load
from skymoe.quantize.config import QuantizeConfig
from skymoe.quantize.run import run as quantize
from skymoe.spec.quantization import Fp8Scheme
from skymoe.upcycle.config import Method, UpcycleConfig
from skymoe.upcycle.run import run as upcycle

SPARE_BYTES = 1 << 30  # of address space, beyond what torch and the valid models need


@dataclass(frozen=True)
class Answer:
    """What one job did with one directory.

    Attributes:
        case, job: which.
        error: class of what was raised; "" when the job went through.
        message: of the error.
        exit_code: of the error; None for an error that is not ours.
        left: what was changed or left beside the model.
        out: OUT exists.
        leaked: files of OUT that hold the secret.
        grown: bytes by which the peak of resident memory rose.
    """

    case: str
    job: str
    error: str
    message: str
    exit_code: int | None
    left: tuple[str, ...]
    out: bool
    leaked: tuple[str, ...]
    grown: int


def _upcycle(model: Path, out: Path, **options: Any) -> object:
    return upcycle(UpcycleConfig(sources=(model,), out=out, receipt_tokens=5, **options))


JOBS: dict[str, Callable[[Path, Path], object]] = {
    "load": lambda model, out: load(model),
    "inspect": lambda model, out: inspect(InspectConfig(model=str(model))),
    "upcycle": lambda model, out: _upcycle(model, out, experts=8, top_k=2),
    "upcycle --method duplicate": lambda model, out: _upcycle(model, out, method=Method.DUPLICATE, experts=12),
    "export": lambda model, out: export(ExportConfig(source=model, out=out, format=Format.SKYMOE, receipt_tokens=5)),
    "quantize": lambda model, out: quantize(
        QuantizeConfig(source=str(model), out=out, scheme=Fp8Scheme.CHANNEL, receipt_tokens=5)
    ),
    "generate": lambda model, out: generate(GenerateConfig(model=model, prompt="a", max_tokens=2)),
    "merge-check": lambda model, out: compare(CompareConfig(left=model, right=model.parent / VICTIM)),
    "merge-check --raw": lambda model, out: compare(CompareConfig(left=model, right=model, raw=True)),
}
COPYING = ("upcycle", "upcycle --method duplicate", "export", "quantize")  # these pass the parent's documents on
MIXTURES = ("moe", "skymoe")


def jobs_for(base: str) -> list[str]:
    """The jobs that take a model such as `base`: one way of upcycling starts from a dense model, one from a mixture."""
    other = "upcycle" if base in MIXTURES else "upcycle --method duplicate"
    return [job for job in JOBS if job != other]


def must_refuse(case: Case, job: str) -> bool:
    """Whether `job` must refuse this directory."""
    passed = {"all": (), "model": ("merge-check --raw",), "values": ("merge-check --raw", "inspect")}
    return job not in passed[case.refused] if case.refused in passed else case.refused == "copying" and job in COPYING


def may_refuse(case: Case, job: str) -> bool:
    """Whether `job` is allowed to."""
    reads_tokenizer = job == "generate"  # and cannot do without one; the others pass it on
    return case.refused in ("all", "model", "values", "maybe") or must_refuse(case, job) or reads_tokenizer


def main(scratch: Path, answers: Path) -> None:
    """All cases through all jobs; then the valid models, which must go through."""
    torch.set_num_threads(1)
    bases = {name: make(scratch / "bases" / name) for name, make in BASES.items()}
    for name in bases:
        _work(place(bases, name, scratch / f"warm-{name}"), name, "warm", io.StringIO())
    limit = _address_space() + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with answers.open("w", buffering=1) as file:
        for number, (name, case) in enumerate(CASES.items()):
            model = place(bases, case.base, scratch / str(number))
            case.make(model)
            _work(model, case.base, name, file)
        for name in bases:
            _work(place(bases, name, scratch / f"valid-{name}"), name, f"valid: {name}", file)


def _work(model: Path, base: str, name: str, file: TextIO) -> None:
    for job in jobs_for(base):
        print(json.dumps({"begun": name, "job": job}), file=file)
        print(json.dumps(asdict(_run(name, job, JOBS[job], model))), file=file)
    shutil.rmtree(model.parent)


def _run(name: str, job: str, run: Callable[[Path, Path], object], model: Path) -> Answer:
    parent, out = model.parent, model.parent / "out"
    before, peak = _listing(parent), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error, message, exit_code = "", "", None
    try:
        run(model, out)
    except (Exception, SystemExit) as raised:  # not kept: its traceback would hold on to all that the job had read
        error, message = type(raised).__name__, _message(raised)
        exit_code = raised.exit_code if isinstance(raised, SkymoeError) else None
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    exists = os.path.lexists(out)
    leaked = [str(path.relative_to(out)) for path in out.rglob("*") if path.is_file() and SECRET in path.read_bytes()]
    if exists:
        shutil.rmtree(out)
    after = _listing(parent)
    left = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    return Answer(name, job, error, message, exit_code, tuple(left), exists, tuple(leaked), grown * 1024)


def _message(error: BaseException) -> str:
    """What the error says; of one that is not ours also where it was raised."""
    if isinstance(error, SkymoeError):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{error} ({last.filename}:{last.lineno})"


def _listing(parent: Path) -> dict[str, Any]:
    """Everything below and beside the model: kind, size, time of change, target of links. The canary would be in it."""
    found: dict[str, Any] = {}
    for folder, folders, files in os.walk(parent):
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            info = os.lstat(path)
            changed = 0 if name in ("model", "victim") or os.path.isdir(path) else info.st_mtime_ns
            found[os.path.relpath(path, parent)] = (info.st_mode, info.st_size if changed else 0, changed)
    return found


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
