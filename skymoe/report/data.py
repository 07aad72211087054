"""Read what a run left behind: `metrics.jsonl`, `recipe.yaml`, `environment.json`, and a demo's extra files.

Reading is tolerant where a report still makes sense (a missing file becomes a note) and strict where it does not: no
`metrics.jsonl`, no record in it.

Shapes: S training records, N MoE layers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skymoe.base.errors import FormatError, printable
from skymoe.report.metrics import Columns, number, read_records
from skymoe.report.timeline import Timeline, read_timeline

_MAX_DOCUMENT_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        path, name: where it is and what the page calls it.
        header: the first record of `metrics.jsonl` (parameters, MoE layer ids, seed, parent), or {}.
        train: column name -> (S,) values; missing ones are NaN.
        layers: column name -> (S, N) values, only those that the run logged.
        evals, events: those records, in order.
        recipe: the resolved recipe as text, "" when there is none.
        environment: the machine and the package versions, {} when unknown.
        timeline: the last one that was logged, None for a run of one process.
    """

    path: Path
    name: str
    header: dict[str, Any]
    train: dict[str, NDArray[np.float64]]
    layers: dict[str, NDArray[np.float64]]
    evals: tuple[dict[str, Any], ...]
    events: tuple[dict[str, Any], ...]
    recipe: str
    environment: dict[str, Any]
    notes: tuple[str, ...]
    timeline: Timeline | None = None

    @property
    def is_moe(self) -> bool:
        """Whether the trained model has MoE layers."""
        return bool(self.moe_layers) or bool(self.layers)

    @property
    def world_size(self) -> int:
        """How many ranks trained it, at the end."""
        known = self.train["world_size"][np.isfinite(self.train["world_size"])]
        return int(known[-1]) if len(known) else 1

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Global ids of the MoE layers, as the header says."""
        ids = self.header.get("moe_layers")
        return tuple(int(i) for i in ids if number(i) is not None) if isinstance(ids, list) else ()


@dataclass(frozen=True)
class Material:
    """Everything one page is made from.

    Attributes:
        runs: the runs to compare, in order.
        parent: the run that trained the dense parent (a demo's `dense-pretrain`), or None.
        demo: the demo directory, or None.
        summary, receipt: `summary.json` and the upcycling receipt, {} when there are none.
        samples: rows of {prompt, <run or role>: text}.
        notes: what could not be read, one line each.
    """

    runs: tuple[Run, ...]
    parent: Run | None = None
    demo: Path | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    receipt: dict[str, Any] = field(default_factory=dict)
    samples: tuple[dict[str, str], ...] = ()
    notes: tuple[str, ...] = ()


def read_run(path: Path, name: str | None = None) -> Run:
    """Read one run directory. Raises FormatError when it is none."""
    metrics = path / "metrics.jsonl"
    if not metrics.is_file():
        raise FormatError(
            "this is no run directory: it has no metrics.jsonl",
            where=path,
            hint="give the directory that `skymoe train` or `skymoe demo` wrote",
        )
    notes: list[str] = []
    header: dict[str, Any] = {}
    evals: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = []
    timeline: dict[str, Any] = {}
    columns = Columns()
    for record in read_records(metrics, notes):
        kind = record.get("kind")
        if kind == "run" and not header:
            header = record
        elif kind == "train" and number(record.get("step")) is not None:
            columns.append(record)
        elif kind == "eval" and number(record.get("step")) is not None:
            evals = [old for old in evals if old["step"] < record["step"]] + [record]
        elif kind == "timeline" and number(record.get("step")) is not None:
            timeline = record
        elif kind == "event":
            events.append(record)
    if not (header or len(columns) or evals):
        raise FormatError("metrics.jsonl holds no record of a run", where=metrics)
    train, layers = columns.arrays()
    return Run(
        path=path,
        name=name or path.resolve().name,
        header=header,
        train=train,
        layers=layers,
        evals=tuple(evals),
        events=tuple(events),
        recipe=_text(path / "recipe.yaml"),
        environment=_document(path / "environment.json", dict, notes),
        timeline=read_timeline(timeline, notes) if timeline else None,
        notes=tuple(notes),
    )


def read_material(paths: tuple[Path, ...]) -> Material:
    """Read run directories, or one demo directory. Raises FormatError when there is nothing to show."""
    if len(paths) == 1 and not (paths[0] / "metrics.jsonl").exists() and _is_demo(paths[0]):
        return _read_demo(paths[0])
    names = _distinct_names(paths)
    runs = tuple(read_run(path, name) for path, name in zip(paths, names, strict=True))
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    return Material(runs=runs, receipt=_receipt_of_parent(runs, notes), notes=tuple(notes))


def _is_demo(path: Path) -> bool:
    return any((path / name / "metrics.jsonl").is_file() for name in ("dense-continue", "moe-train"))


def _read_demo(path: Path) -> Material:
    notes: list[str] = []
    names = {"dense-continue": "dense, continued", "moe-train": "MoE"}
    runs = tuple(read_run(path / stem, name) for stem, name in names.items() if _is_run(path / stem, notes))
    parent = read_run(path / "dense-pretrain", "dense parent") if _is_run(path / "dense-pretrain", notes) else None
    summary = _document(path / "summary.json", dict, notes)
    receipt = _document(path / "moe" / "receipt.json", dict, notes) or summary.get("receipt") or {}
    notes += [f"{run.name}: {note}" for run in runs for note in run.notes]
    return Material(
        runs=runs,
        parent=parent,
        demo=path,
        summary=summary,
        receipt=receipt if isinstance(receipt, dict) else {},
        samples=_samples(_document(path / "samples.json", list, notes)),
        notes=tuple(notes),
    )


def _is_run(path: Path, notes: list[str]) -> bool:
    found = (path / "metrics.jsonl").is_file()
    if not found:
        notes.append(f"{path.name}/metrics.jsonl is missing")
    return found


def _receipt_of_parent(runs: tuple[Run, ...], notes: list[str]) -> dict[str, Any]:
    """The upcycling receipt beside the weights that a MoE run started from, if they are still there."""
    for run in runs:
        parent = run.header.get("parent")
        if run.is_moe and isinstance(parent, str) and (Path(parent) / "receipt.json").is_file():
            receipt: dict[str, Any] = _document(Path(parent) / "receipt.json", dict, notes)
            return receipt
    return {}


def _samples(rows: list[Any]) -> tuple[dict[str, str], ...]:
    texts = [
        {key: value for key, value in row.items() if isinstance(value, str)} for row in rows if isinstance(row, dict)
    ]
    return tuple(row for row in texts if "prompt" in row)


def _distinct_names(paths: tuple[Path, ...]) -> list[str]:
    """The directories' last parts; with more of the path where two are the same."""
    parts = [path.resolve().parts for path in paths]
    depth = 1
    while depth < max(map(len, parts)) and len({p[-depth:] for p in parts}) < len(set(parts)):
        depth += 1
    return ["/".join(p[-depth:]).replace("//", "/") for p in parts]


def _document(path: Path, kind: type[Any], notes: list[str]) -> Any:
    """A JSON file that must hold a `kind`; an empty one with a note when it cannot be used, silently when absent."""
    if not path.is_file():
        return kind()
    try:
        if path.stat().st_size > _MAX_DOCUMENT_BYTES:
            raise ValueError("it is too large")
        data = json.loads(path.read_bytes())
        if not isinstance(data, kind):
            raise ValueError(f"it holds no {kind.__name__}")
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} could not be read: {printable(error, 120)}")
        return kind()
    return data


def _text(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return file.read(_MAX_DOCUMENT_BYTES).decode("utf-8", "replace")
