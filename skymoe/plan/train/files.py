"""The files that are asked for: the plan that `skymoe train` replays, the report as JSON and as a page."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from skymoe.base.errors import ConfigError
from skymoe.base.files import machine_errors, refuse_no_file, write_atomic
from skymoe.plan.train.config import PlanTrainConfig
from skymoe.plan.train.expected import expected_of, layout_of
from skymoe.plan.train.page import plan_page
from skymoe.plan.train.priced import LEVELS
from skymoe.plan.train.result import TrainPlan
from skymoe.plan.work import Recompute
from skymoe.spec.plan_file import Plan, write_plan

_REPLAYED = (Recompute.NONE, Recompute.FULL)


def check_files(config: PlanTrainConfig) -> None:
    """Refuse before the search what cannot be written after it. Directories are not made, but for the last of `out`.

    Raises:
        ConfigError: no file can be at a path, or the plan file has no word for what would be run again.
        MachineError: the system does not say.
    """
    for path in (config.save, config.html):
        if path is not None:
            refuse_no_file(path)
    if config.out is not None:
        with machine_errors(config.out):
            if not config.out.is_dir():
                if config.out.exists():
                    raise ConfigError("this path cannot be used: it is a file", where=config.out, hint="a directory")
                refuse_no_file(config.out)
    if config.save is not None and LEVELS[config.recompute] not in _REPLAYED:
        raise _no_word(config.recompute)


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
    check_files(config)
    saves, pages = [config.save], [config.html]
    writers: list[tuple[Path | None, Callable[[Path], None]]] = []
    if config.out is not None:
        with machine_errors(config.out):
            config.out.mkdir(exist_ok=True)
        writers.append((config.out / "report.json", partial(_write_json, report)))
        saves += [config.out / "plan.json"] if replayable(report) else []
        pages.append(config.out / "plan.html")
    if config.save is not None and not replayable(report):
        raise _no_word(report.layout.recompute)
    writers += [(path, partial(write_plan, _plan(report))) for path in saves]
    drawn = plan_page(report) if any(pages) else ""
    writers += [(path, lambda path: write_atomic(path, drawn.encode())) for path in pages]
    wanted = [(path, write) for path, write in writers if path is not None]
    for path, write in wanted:
        write(path)
    return tuple(path for path, _ in wanted)


def replayable(report: TrainPlan) -> bool:
    """Whether a plan file says all of it."""
    return Recompute(report.layout.recompute) in _REPLAYED


def _no_word(level: str) -> ConfigError:
    return ConfigError(
        f"a plan file has no word for {level} recomputation", where="--save",
        why="skymoe train runs whole layers again", hint="--recompute auto",
    )  # fmt: skip


def _plan(report: TrainPlan) -> Plan:
    return Plan(round(sum(report.best.split)), layout_of(report), expected_of(report))


def _write_json(report: TrainPlan, path: Path) -> None:
    text = json.dumps(report.as_json(), indent=2, allow_nan=False, ensure_ascii=False)
    write_atomic(path, f"{text}\n".encode())
