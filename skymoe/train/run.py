"""`skymoe train`: run(config) -> TrainReport.

settings and lock -> start (check, build, resume) -> train (the loop) -> export -> report
"""

from __future__ import annotations

import time

from skymoe.base.errors import TrainingError
from skymoe.convert.result import written
from skymoe.train.config import TrainConfig
from skymoe.train.job import Job
from skymoe.train.loop import train
from skymoe.train.metrics import read_metrics
from skymoe.train.result import TrainReport
from skymoe.train.settings import run_directory, torch_settings
from skymoe.train.signals import StopRequest, watch_signals
from skymoe.train.start import start, tokenizer_directory


def run(config: TrainConfig) -> TrainReport:
    """Train by the recipe, or go on where its run directory stands.

    Raises:
        ConfigError, FormatError: recipe, model or data cannot be used; nothing was written.
        TrainingError: the guard stopped the run.
        MachineError: the directory is in use or cannot be written.
    """
    began = time.perf_counter()
    with run_directory(config.run.dir), torch_settings(config) as device, watch_signals() as stop:
        job = start(config, device)
        try:
            train(job, stop)
            finished = job.state.counters.step >= config.steps
            if finished:
                _export(job)
            else:
                job.event("stop", signal=stop.signal.name if stop.signal else "")
        finally:
            job.metrics.close()
            job.trackers.close()
        return _report(job, stop, time.perf_counter() - began)


def _export(job: Job) -> None:
    # Written again by every call that finds the run finished: it may be stale or damaged.
    config, out = job.config, job.config.run.dir / "model"
    if bad := job.state.engine.non_finite():
        raise TrainingError(
            f"the trained weights are not finite: {', '.join(bad[:5])}",
            where=config.run.dir,
            hint="the last generation in checkpoints/ is sound; lower optimizer.lr, or set guard.non_finite=rollback",
        )
    tokenizer = tokenizer_directory(config.data, config.model.path)
    job.state.engine.export(out, tokenizer)


def _report(job: Job, stop: StopRequest, seconds: float) -> TrainReport:
    counters, evaluation = job.state.counters, job.state.evaluation or {}
    config = job.config
    finished = counters.step >= config.steps
    losses = [line["loss"] for line in read_metrics(config.run.dir / "metrics.jsonl") if line["kind"] == "train"]
    model = written(config.run.dir / "model", seconds) if finished else None
    return TrainReport(
        dir=str(config.run.dir),
        model=str(model.out) if model else None,
        files=model.files if model else (),
        bytes_written=model.bytes_written if model else 0,
        step=counters.step,
        steps=config.steps,
        tokens=counters.tokens,
        seconds=seconds,
        tokens_per_s=counters.tokens / counters.seconds if counters.seconds else 0.0,
        loss=losses[-1] if losses else None,
        bits_per_byte=evaluation.get("bits_per_byte", {}),
        valid_loss=evaluation.get("loss", {}),
        skipped=job.state.guard.skipped,
        resumed_from=job.resumed_from,
        stopped_by=stop.signal.name if stop.signal and not finished else "",
        note="" if finished else f"stopped at step {counters.step}; the same command goes on from there",
    )
