"""`skymoe demo`: a dense model becomes a better mixture of experts, on real text, on any machine.

    corpus -> dense parent -> upcycle (receipt) -> train the MoE | continue the parent, same tokens -> samples -> report

Each stage is an ordinary job with an ordinary recipe, and leaves an ordinary result: what the demo does in one
command can be repeated, changed and looked at stage by stage. A stage whose result stands is not run again, so an
interrupted demo goes on by the same command.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skymoe.base.errors import ConfigError, MissingExtraError
from skymoe.base.files import staging_directory, write_atomic
from skymoe.base.log import logger
from skymoe.convert.result import written
from skymoe.data.corpus import build_demo_corpus
from skymoe.demo.config import DemoConfig
from skymoe.demo.recipes import (
    DENSE,
    EXPERTS,
    FULL,
    PROMPTS,
    QUICK,
    TOP_K,
    Places,
    Scale,
    further_recipe,
    parent_recipe,
)
from skymoe.generate.config import GenerateConfig
from skymoe.generate.run import run as generate
from skymoe.report.config import ReportConfig
from skymoe.report.data import read_material
from skymoe.report.run import run as report
from skymoe.report.verdict import compare
from skymoe.spec.presets import preset
from skymoe.train.config import TrainConfig
from skymoe.train.result import INTERRUPTED, TrainReport
from skymoe.train.run import run as train
from skymoe.upcycle.config import UpcycleConfig
from skymoe.upcycle.run import run as upcycle

_STAGES = ("corpus", "dense", "upcycle", "moe", "dense-continued", "samples", "report")


@dataclass(frozen=True)
class DemoReport:
    """What the demo found.

    Attributes:
        out: its directory.
        summary: what is in `summary.json`; without results when the demo was interrupted.
        exit_code: 0, or 75 when it was interrupted: the same command goes on.
    """

    out: Path
    summary: dict[str, Any]
    exit_code: int = 0


class _InterruptedError(Exception):
    """A training stage was asked to stop, and has saved."""


def run(config: DemoConfig) -> DemoReport:
    """Run the demo, or go on with one.

    Raises:
        ConfigError: `out` holds something else, or a demo with other settings.
        MissingExtraError: plotly or tokenizers is not installed; found before any work is done.
    """
    _check_extras()
    finished = config.out / "summary.json"
    stages = _claim(config)
    if finished.exists() and "report" in (summary := json.loads(finished.read_text(encoding="utf-8"))):
        logger.info("this demo is finished: nothing to do")
        return DemoReport(config.out, summary)
    places, scale = Places(config.out), QUICK if config.quick else FULL
    clock = _Clock(stages)
    try:
        results = _work(config, places, scale, clock)
    except _InterruptedError:
        return DemoReport(config.out, {"interrupted": True, "seconds": clock.seconds}, INTERRUPTED)
    summary = _summary(config, results, clock)
    _write_json(config.out / "summary.json", summary)
    with clock.stage("report"):
        page = report(ReportConfig(runs=(config.out,)))
    summary["seconds"] = clock.table()
    summary["report"] = str(page.path)
    summary["models"] = _models(places)
    _write_json(config.out / "summary.json", summary)
    return DemoReport(config.out, summary)


@dataclass(frozen=True)
class _Results:
    parent: TrainReport
    dense: TrainReport
    moe: TrainReport
    receipt: dict[str, Any]


def _work(config: DemoConfig, places: Places, scale: Scale, clock: _Clock) -> _Results:
    with clock.stage("corpus"):
        if not places.corpus.exists():
            build_demo_corpus(places.corpus, vocab_size=preset(DENSE).vocab_size, seed=config.seed, kind=config.corpus)
    with clock.stage("dense"):
        parent = _train(parent_recipe(config, places, scale))
    parent_model = places.parent / "model"
    with clock.stage("upcycle"):
        if not places.upcycled.exists():
            upcycle(
                UpcycleConfig(
                    sources=(parent_model,), out=places.upcycled, experts=EXPERTS, top_k=TOP_K, gate_norm=True,
                    seed=config.seed,
                )
            )  # fmt: skip
    with clock.stage("moe"):
        moe = _train(further_recipe(config, places, scale, directory=places.moe_run, model=places.upcycled))
        _publish(places.moe_run / "model", places.moe, receipt=places.upcycled / "receipt.json")
    with clock.stage("dense-continued"):
        dense = _train(further_recipe(config, places, scale, directory=places.dense_run, model=parent_model))
        _publish(places.dense_run / "model", places.dense)
    with clock.stage("samples"):
        _write_json(places.root / "samples.json", _samples(config, places))
    receipt = json.loads((places.upcycled / "receipt.json").read_text(encoding="utf-8"))
    return _Results(parent, dense, moe, receipt)


def _train(recipe: TrainConfig) -> TrainReport:
    result = train(recipe)
    if result.exit_code:
        raise _InterruptedError
    return result


def _samples(config: DemoConfig, places: Places) -> list[dict[str, str]]:
    """The same prompts, continued by both models with the same random numbers."""

    def text(model: Path, prompt: str) -> str:
        return generate(
            GenerateConfig(model=model, prompt=prompt, max_tokens=64, temperature=0.7, top_k=50, seed=config.seed)
        ).text

    return [
        {"prompt": prompt, "dense": text(places.dense, prompt), "moe": text(places.moe, prompt)}
        for prompt in PROMPTS.values()
    ]


def _summary(config: DemoConfig, results: _Results, clock: _Clock) -> dict[str, Any]:
    dense, moe = results.dense.bits_per_byte, results.moe.bits_per_byte
    return {
        "dense_bits_per_byte": dense["all"],
        "moe_bits_per_byte": moe["all"],
        "parent_bits_per_byte": results.parent.bits_per_byte["all"],
        "bits_per_byte": {"dense": dense, "moe": moe, "parent": results.parent.bits_per_byte},
        "moe_change_at_equal_tokens": moe["all"] / dense["all"] - 1,
        "moe_change_at_equal_compute": _change_at_equal_compute(config.out),
        "receipt": results.receipt,
        "tokens": {"parent": results.parent.tokens, "further": results.moe.tokens},
        "tokens_per_s": {"dense": results.dense.tokens_per_s, "moe": results.moe.tokens_per_s},
        "seed": config.seed,
        "quick": config.quick,
        "seconds": clock.table(),
    }


def _models(places: Places) -> dict[str, dict[str, Any]]:
    """The model directories that the demo leaves: where, and how many bytes."""
    left = {"dense": places.dense, "moe-start": places.upcycled, "moe": places.moe}
    found = {name: written(path, 0.0) for name, path in left.items()}
    return {name: {"out": str(one.out), "bytes_written": one.bytes_written} for name, one in found.items()}


def _change_at_equal_compute(out: Path) -> float | None:
    """Relative difference of the MoE's bits per byte where both have spent the same FLOPs: the harder comparison."""
    comparison = compare(read_material((out,)))
    return comparison.equal_flops.change if comparison and comparison.equal_flops else None


def _publish(model: Path, out: Path, receipt: Path | None = None) -> None:
    """Copy a run's final model to its place in the demo directory."""
    if out.exists():
        return
    with staging_directory(out) as staging:
        shutil.copytree(model, staging, dirs_exist_ok=True)
        if receipt is not None:
            shutil.copy2(receipt, staging / receipt.name)


def _claim(config: DemoConfig) -> Path:
    """Make the directory this demo's own; returns the file of stage times."""
    settings = config.model_dump(mode="json", exclude={"out"})
    marker = config.out / "demo.json"
    if marker.exists():
        if json.loads(marker.read_text(encoding="utf-8")) != settings:
            raise ConfigError(
                "this directory holds a demo with other settings", where=config.out, hint="choose another --out"
            )
    elif config.out.exists() and any(config.out.iterdir()):
        raise ConfigError("the directory is not empty and holds no demo", where=config.out, hint="choose another --out")
    else:
        config.out.mkdir(parents=True, exist_ok=True)
        _write_json(marker, settings)
    return config.out / "stages.json"


def _check_extras() -> None:
    try:
        import plotly  # noqa: F401
        import tokenizers  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("the demo", "text,report") from error


class _Clock:
    """Seconds per stage, kept on disk so that an interrupted demo adds up."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce and time one stage."""
        logger.info(f"{_STAGES.index(name) + 1}/{len(_STAGES)} {name}")
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - began, 3)
            _write_json(self.path, self.seconds)

    def table(self) -> dict[str, float]:
        """Seconds of each stage and of all."""
        return {**self.seconds, "total": round(sum(self.seconds.values()), 3)}


def _write_json(path: Path, content: Any) -> None:
    write_atomic(path, (json.dumps(content, indent=2) + "\n").encode())
