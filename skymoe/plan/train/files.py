"""The files that are asked for: the plan that `skymoe train` replays, the report as JSON and as a page."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from skymoe.base.errors import ConfigError
from skymoe.base.files import machine_errors, write_atomic
from skymoe.plan.train.config import PlanTrainConfig
from skymoe.plan.train.expected import expected_of, layout_of
from skymoe.plan.train.page import plan_page
from skymoe.plan.train.result import TrainPlan
from skymoe.spec.plan_file import Plan, write_plan


def write_files(config: PlanTrainConfig, report: TrainPlan) -> tuple[Path, ...]:
    """Write what `config` asks for; the directory `out` gets all of it.

    Args:
        config: with paths.
        report: what is written.

    Returns:
        The files.

    Raises:
        ConfigError: the plan file has no word for what would be run again.
        MachineError: the system refuses.
    """
    saves, pages = [config.save], [config.html]
    writers: list[tuple[Path | None, Callable[[Path], None]]] = []
    if config.out is not None:
        writers.append((config.out / "report.json", partial(_write_json, report)))
        saves += [config.out / "plan.json"] if replayable(report) else []
        pages.append(config.out / "plan.html")
    if config.save is not None and not replayable(report):
        raise ConfigError(
            f"a plan file has no word for {report.layout.recompute} recomputation", where="--save",
            why="skymoe train runs whole layers again", hint="--recompute auto",
        )  # fmt: skip
    writers += [(path, partial(write_plan, _plan(report))) for path in saves]
    drawn = plan_page(report) if any(pages) else ""
    writers += [(path, lambda path: write_atomic(path, drawn.encode())) for path in pages]
    wanted = [(path, write) for path, write in writers if path is not None]
    for path, write in wanted:
        with machine_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    return tuple(path for path, _ in wanted)


def replayable(report: TrainPlan) -> bool:
    """Whether a plan file says all of it."""
    return report.layout.recompute in ("none", "full")


def _plan(report: TrainPlan) -> Plan:
    return Plan(round(sum(report.best.split)), layout_of(report), expected_of(report))


def _write_json(report: TrainPlan, path: Path) -> None:
    text = json.dumps(report.as_json(), indent=2, allow_nan=False, ensure_ascii=False)
    write_atomic(path, f"{text}\n".encode())
