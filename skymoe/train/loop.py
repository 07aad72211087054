"""The loop: read -> step -> log -> evaluate -> save, until the last step or a signal.

The order matters for resuming. Metrics are pushed to the disk and evaluation is done *before* the generation of the
same step is published: so a run killed anywhere goes on from a generation whose past is complete, and does again
only what comes after.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from skymoe.base.errors import CheckpointError, MachineError
from skymoe.base.log import logger
from skymoe.base.progress import Progress, progress
from skymoe.train.batches import StepBatch, read_step
from skymoe.train.guard import Action, stop_reason
from skymoe.train.job import Job
from skymoe.train.lines import event_fields, progress_fields, train_line
from skymoe.train.ranks_watch import watch_ranks
from skymoe.train.schedule import learning_rate
from skymoe.train.signals import StopRequest
from skymoe.train.state import Window, restore_state, save_state
from skymoe.train.step import StepResult, train_step


def train(job: Job, stop: StopRequest) -> None:
    """Take all steps that are left, or as many as there are before a stop is asked for."""
    config, state = job.config, job.state
    if state.counters.step == 0:
        _before_the_first_step(job)
    left = config.steps - state.counters.step
    saved_step: int | None = state.counters.step
    with progress("train", total=left, unit="step") as bar:
        while state.counters.step < config.steps and not state.engine.any_of(bool(stop)):
            if _settle(job, _take_step(job), bar):
                saved_step = _do_what_is_due(job) or saved_step
            if not _publish(job, state.engine.poll):
                saved_step = None
    if state.counters.step != saved_step:  # a signal, between two saves
        save(job)
    job.phase("save")
    _publish(job, state.engine.finish)


def save(job: Job) -> bool:
    """Publish a generation, unless a weight is not finite: what can be returned to must be sound.

    A failure to write is a warning or the end of the run, as the recipe says; older generations stay whole. Returns
    whether there is a new one.
    """
    job.phase("save")
    _publish(job, job.state.engine.finish)  # one in flight: how it ended is told before another begins
    began, keep = time.perf_counter(), job.config.checkpoint.keep
    job.metrics.flush()
    if bad := job.state.engine.non_finite():
        logger.warning("step %d: not saved, not finite: %s", job.state.counters.step, ", ".join(bad[:5]))
        job.event("save_refused", not_finite=bad[:5])
        return False
    if not _publish(job, lambda: save_state(job.state, job.checkpoints, identity=job.identity, keep=keep), began):
        return False
    job.state.guard.rollbacks = 0
    return True


def _publish(job: Job, action: Callable[[], Path | None], began: float | None = None) -> bool:
    """Save, or look after a save that was begun; tells what was published. Returns False when it failed."""
    try:
        path = action()
    except (MachineError, OSError) as error:
        if job.config.checkpoint.on_save_error == "abort":
            raise
        logger.warning("the checkpoint of step %d was not saved, training goes on: %s", job.state.counters.step, error)
        job.event("save_failed", error=str(error))
        return False
    if path is not None:
        seconds = {} if began is None else {"seconds": time.perf_counter() - began}
        job.event("save", generation=path.name, **seconds)
    return True


def _before_the_first_step(job: Job) -> None:
    guard = job.config.guard
    if job.held.domains and job.config.evaluate.at_start:
        _evaluate(job)
    if Action.ROLLBACK in (guard.non_finite, guard.spike):
        save(job)  # something to roll back to


def _take_step(job: Job) -> tuple[StepBatch, StepResult, float]:
    config, counters = job.config, job.state.counters
    start = time.perf_counter()
    job.phase("read data")
    layout, place = (job.mesh.layout, job.mesh.coordinate) if job.mesh else (None, None)
    replicas = layout.dp if layout else 1
    batch = read_step(
        job.mixture,
        counters.next_sample,
        config.batch.sequences,
        micro_sequences=config.batch.micro_sequences or config.batch.sequences // replicas,
        device=job.device,
        replica=(place.dp if place else 0, replicas),
    )
    job.phase("train")
    lr = learning_rate(counters.step, config.steps, lr=config.optimizer.lr, schedule=config.schedule)
    result = train_step(job.state, batch, lr=lr, objective=job.objective, balance=config.balance)
    seconds = time.perf_counter() - start
    counters.step += 1
    counters.next_sample += batch.num_samples
    counters.seconds += seconds
    counters.window.seconds += seconds
    return batch, result, lr


def _settle(job: Job, taken: tuple[StepBatch, StepResult, float], bar: Progress) -> bool:
    """Count an accepted step and log it when its turn has come; skip, roll back or raise otherwise.

    Returns whether the run moved on. After a rollback it stands where it was saved: nothing is due there again, and
    the count of rollbacks goes on until a later step is saved.
    """
    batch, result, lr = taken
    counters, config = job.state.counters, job.config
    if result.verdict.action is not Action.ACCEPT:
        return _refuse(job, result, bar)
    counters.tokens += batch.num_tokens
    counters.flops += batch.num_tokens * job.machine.flops.model_causal
    window = counters.window
    window.loss, window.targets = window.loss + result.loss, window.targets + batch.num_targets
    window.tokens += batch.num_tokens
    if counters.step % config.log.every and counters.step < config.steps:
        bar.advance()
        return True
    job.phase("log")
    line = train_line(job, result, lr)
    job.record(line)
    watch_ranks(job)
    counters.window = Window()
    bar.advance(**progress_fields(line))
    return True


def _refuse(job: Job, result: StepResult, bar: Progress) -> bool:
    """Skip, roll back or raise; returns whether the run moved on."""
    counters, verdict = job.state.counters, result.verdict
    logger.warning("step %d: %s: %s", counters.step, verdict.action, verdict.reason)
    match verdict.action:
        case Action.SKIP:
            job.event("skip", **event_fields(result))
            bar.advance()
            return True
        case Action.ROLLBACK:
            bar.advance(_roll_back(job, result))
            return False
        case _:
            _publish(job, job.state.engine.finish)
            job.event("stop", **event_fields(result))
            job.metrics.flush()
            raise stop_reason(verdict, counters.step)


def _roll_back(job: Job, result: StepResult) -> int:
    """Return to the last generation, past the data of the bad step. Returns the steps done, less those undone."""
    state, bad = job.state, job.state.counters
    _publish(job, state.engine.finish)
    generation = state.engine.latest(job.checkpoints)
    if generation is None:
        raise CheckpointError("there is no whole generation to roll back to", where=job.checkpoints)
    guard = state.guard.state()
    restore_state(state, generation)
    state.guard.restore({**guard, "losses": state.guard.state()["losses"]})
    state.counters.next_sample, state.counters.seconds = bad.next_sample, bad.seconds
    job.metrics.truncate_after(state.counters.step)
    job.event("rollback", from_step=bad.step, next_sample=bad.next_sample, **event_fields(result))
    return state.counters.step - bad.step + 1


def _do_what_is_due(job: Job) -> int | None:
    """Evaluate and save when their turn has come. Returns the step if it was saved."""
    step, config = job.state.counters.step, job.config
    finished = step >= config.steps
    if job.held.domains and (finished or (config.evaluate.every and step % config.evaluate.every == 0)):
        _evaluate(job)
    if finished or (config.checkpoint.every and step % config.checkpoint.every == 0):
        return step if save(job) else None
    return None


def _evaluate(job: Job) -> None:
    counters = job.state.counters
    job.phase("evaluate")
    figures = job.state.engine.evaluate(job.held, job.objective.compute)
    job.state.evaluation = figures
    job.record({"kind": "eval", "step": counters.step, "tokens": counters.tokens, "flops": counters.flops, **figures})
