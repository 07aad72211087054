"""From a recipe to a Job: check, open, build, resume. Nothing is written before everything has been checked."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from skymoe.base.config import dump_config
from skymoe.base.document import read_document
from skymoe.base.errors import ConfigError
from skymoe.base.files import write_atomic
from skymoe.base.log import logger
from skymoe.data.evaluation import EvaluationWindows
from skymoe.data.sampler import Mixture, Source
from skymoe.data.token_bytes import token_byte_lengths
from skymoe.parallel.checkpoint import latest_generation_distributed
from skymoe.parallel.heartbeat import Heartbeat
from skymoe.parallel.launch import World
from skymoe.parallel.mesh import Mesh
from skymoe.parallel.stragglers import StepTimes
from skymoe.spec.model import ModelSpec
from skymoe.train.build import resolve_spec
from skymoe.train.config import DataConfig, TrainConfig
from skymoe.train.environment import environment
from skymoe.train.evaluate import Held
from skymoe.train.job import Job
from skymoe.train.lines import run_line
from skymoe.train.metrics import MetricsLog, NoMetrics
from skymoe.train.resume import check_same_run
from skymoe.train.state import restore_state
from skymoe.train.trackers import open_trackers
from skymoe.train.upkeep_config import TrackConfig
from skymoe.train.wiring import build_state, find_mesh, measure_machine, objective_of
from skymoe.weights.generation import Generation, latest_generation


def start(config: TrainConfig, world: World, heart: Heartbeat) -> Job:
    """The job of `config`: fresh, or as the newest whole generation in its run directory left it.

    On many ranks every one of them calls it, and the first one alone writes.

    Raises:
        ConfigError: the recipe contradicts itself, the model, or the run that the directory holds.
        FormatError: model or data cannot be read.
    """
    spec = resolve_spec(config)
    mixture = _open_mixture(config, spec)
    held = _open_held(config, spec)
    identity = _identity(config, spec, mixture)
    device, mesh = world.device, find_mesh(config, spec, world)
    if mesh is not None:
        heart.coordinate = mesh.coordinate
        heart.phase("look for a checkpoint", 0)
    generation = _find_generation(config, identity, mesh)
    heart.phase("build the model", 0)
    state = build_state(config, spec, device, mesh, load_weights=generation is None)
    if generation is not None:
        restore_state(state, generation)
    step = state.counters.step
    directory = config.run.dir
    is_chief = world.rank == 0
    track = config.track if is_chief else TrackConfig()
    trackers = open_trackers(track, directory, identity["recipe"], step)
    objective = objective_of(config, spec)
    job = Job(
        config=config,
        state=state,
        objective=objective,
        mixture=mixture,
        held=held,
        machine=measure_machine(config, spec, mesh, device, objective),
        device=device,
        metrics=(MetricsLog if is_chief else NoMetrics)(directory / "metrics.jsonl"),
        trackers=trackers,
        identity=identity,
        resumed_from=None if generation is None else step,
        heart=heart,
        mesh=mesh,
        times=None if mesh is None else StepTimes(mesh),
    )
    state.engine.tell(lambda phase, waits: job.phase(phase, waits=waits))
    if is_chief:
        write_atomic(directory / "recipe.yaml", dump_config(config).encode())
        write_atomic(directory / "environment.json", json.dumps(environment(device), indent=2).encode())
    _open_record(job, generation)
    return job


def _open_record(job: Job, generation: Generation | None) -> None:
    """Take back what lies after the generation, and say where this call begins."""
    job.metrics.truncate_after(-1 if generation is None else generation.step)
    if generation is None:
        job.record(run_line(job))
        job.event("start")
        return
    for directory, reason in generation.skipped:
        job.event("fallback", directory=directory, reason=reason)
    job.event("resume", generation=generation.path.name)


def _find_generation(config: TrainConfig, identity: dict[str, Any], mesh: Mesh | None) -> Generation | None:
    directory = config.run.dir
    root = directory / "checkpoints"
    generation = latest_generation(root) if mesh is None else latest_generation_distributed(root, mesh)
    if generation is None:
        recipe = directory / "recipe.yaml"
        if recipe.exists():
            check_same_run({**identity, "recipe": _comparable(read_document(recipe).data)}, identity, directory)
        return None
    saved = generation.document("state")
    if generation.step > config.steps:
        raise ConfigError(
            f"this run is at step {generation.step} already, beyond the {config.steps} asked for",
            where=directory,
            hint="ask for more steps, or choose another run.dir",
        )
    for key in check_same_run(saved, identity, directory):
        logger.info("resuming with another %s", key)
    if saved["torch"] != identity["torch"] or saved["threads"] != identity["threads"]:
        logger.warning("resuming with another torch or number of threads: not bit for bit what it would have been")
    return generation


def _comparable(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with the path of its model made absolute: however it was written, it is the same model."""
    path = recipe["model"].get("path")
    return recipe if path is None else {**recipe, "model": {**recipe["model"], "path": str(Path(path).resolve())}}


def _identity(config: TrainConfig, spec: ModelSpec, mixture: Mixture) -> dict[str, Any]:
    identity = {
        "recipe": _comparable(config.model_dump(mode="json")),
        "model": asdict(spec),
        "data": {"fingerprint": mixture.fingerprint, "seed": config.run.seed},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(identity))
    return plain


def _open_mixture(config: TrainConfig, spec: ModelSpec) -> Mixture:
    data = config.data
    return Mixture(
        [Source(source.path, source.weight, source.domain) for source in data.train],
        sequence_length=data.sequence_length,
        seed=config.run.seed,
        isolate_documents=data.isolate_documents,
        vocab_size=spec.vocab_size,
    )


def _open_held(config: TrainConfig, spec: ModelSpec) -> Held:
    data, evaluation = config.data, config.evaluate
    domains = {
        source.domain: EvaluationWindows(
            source.path,
            data.sequence_length,
            evaluation.windows or None,
            isolate_documents=data.isolate_documents,
            vocab_size=spec.vocab_size,
        )
        for source in data.valid
    }
    batch = evaluation.batch or config.batch.micro_sequences or config.batch.sequences
    tokenizer = tokenizer_directory(data, config.model.path)
    lengths_V = None
    if tokenizer is not None and domains:
        lengths_V = token_byte_lengths(tokenizer, vocab_size=spec.vocab_size)
    return Held(domains, lengths_V, batch, data.isolate_documents)


def tokenizer_directory(data: DataConfig, model: Path | None) -> Path | None:
    """Where the tokenizer is: the one named by the recipe, or the model's own."""
    if data.tokenizer is not None:
        return data.tokenizer
    return model if model is not None and (model / "tokenizer.json").exists() else None
