"""`skymoe train`: run(config) -> TrainReport.

lock, settings, world (of one rank or many) -> start (check, build, resume) -> train (the loop) -> export -> report
"""

from __future__ import annotations

import time
from contextlib import ExitStack

from skymoe.base.errors import CheckpointError, TrainingError
from skymoe.convert.result import written
from skymoe.model.export import export_generation
from skymoe.model.save import save_pretrained
from skymoe.parallel.launch import distributed
from skymoe.parallel.lifeline import is_first_rank
from skymoe.parallel.watch import watching
from skymoe.train.config import TrainConfig
from skymoe.train.engine import SingleEngine
from skymoe.train.job import Job
from skymoe.train.loop import train
from skymoe.train.metrics import read_metrics
from skymoe.train.result import TrainReport
from skymoe.train.settings import run_directory, torch_settings
from skymoe.train.signals import StopRequest, watch_signals
from skymoe.train.start import start, tokenizer_directory
from skymoe.weights.generation import latest_generation


def run(config: TrainConfig) -> TrainReport:
    """Train by the recipe, or go on where its run directory stands.

    Raises:
        ConfigError, FormatError: recipe, model or data cannot be used; nothing was written.
        TrainingError: the guard stopped the run.
        MachineError: the directory is in use or cannot be written.
    """
    began = time.perf_counter()
    is_chief = is_first_rank()
    with ExitStack() as held, torch_settings(config), watch_signals() as stop:
        timeout_s = config.parallel.timeout_s
        with distributed(timeout_s, device=config.run.device) as world, watching(world, timeout_s=timeout_s) as heart:
            if is_chief:
                held.enter_context(run_directory(config.run.dir))
            job = start(config, world, heart)
            try:
                train(job, stop)
                finished = job.state.counters.step >= config.steps
                if finished:
                    _check_finite(job)
                else:
                    job.event("stop", signal=stop.signal.name if stop.signal else "")
            finally:
                job.metrics.close()
                job.trackers.close()
        if finished and is_chief:
            _export(job)
        return _report(job, stop, time.perf_counter() - began)


def _check_finite(job: Job) -> None:
    if bad := job.state.engine.non_finite():
        raise TrainingError(
            f"the trained weights are not finite: {', '.join(bad[:5])}",
            where=job.config.run.dir,
            hint="the last generation in checkpoints/ is sound; lower optimizer.lr, or set guard.non_finite=rollback",
        )


def _export(job: Job) -> None:
    """Write the final model. Of a model on many ranks no process has it all: it comes from the last generation.

    Written again by every call that finds the run finished: it may be stale or damaged.
    """
    config, engine = job.config, job.state.engine
    out, tokenizer = config.run.dir / "model", tokenizer_directory(config.data, config.model.path)
    if isinstance(engine, SingleEngine):
        save_pretrained(engine.model, out, tokenizer_from=tokenizer, overwrite=True)
        return
    generation = latest_generation(job.checkpoints)
    if generation is None or generation.step != job.state.counters.step:
        raise CheckpointError("the last step was not saved, so there is nothing to export", where=job.checkpoints)
    export_generation(generation, out, tokenizer_from=tokenizer, overwrite=True)


def _report(job: Job, stop: StopRequest, seconds: float) -> TrainReport:
    counters, evaluation = job.state.counters, job.state.evaluation or {}
    config = job.config
    finished = counters.step >= config.steps
    losses = [line["loss"] for line in read_metrics(config.run.dir / "metrics.jsonl") if line["kind"] == "train"]
    model = written(config.run.dir / "model", seconds) if finished and job.is_chief else None
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
