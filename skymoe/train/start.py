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
from skymoe.ops.balance import AdaptiveCoefficients, AuxLoss
from skymoe.spec.model import ModelSpec
from skymoe.train.build import build_model, resolve_spec
from skymoe.train.config import BalanceConfig, DataConfig, TrainConfig
from skymoe.train.engine import SingleEngine
from skymoe.train.environment import environment
from skymoe.train.evaluate import Held
from skymoe.train.guard import Guard
from skymoe.train.job import Job
from skymoe.train.lines import run_line
from skymoe.train.metrics import MetricsLog
from skymoe.train.objective import Objective
from skymoe.train.optim import Optimizer
from skymoe.train.resume import check_same_run
from skymoe.train.state import TrainState, restore_state
from skymoe.train.throughput import describe_machine
from skymoe.train.trackers import open_trackers
from skymoe.weights.buffers import torch_dtype
from skymoe.weights.generation import Generation, latest_generation


def start(config: TrainConfig, device: torch.device) -> Job:
    """The job of `config`: fresh, or as the newest whole generation in its run directory left it.

    Raises:
        ConfigError: the recipe contradicts itself, the model, or the run that the directory holds.
        FormatError: model or data cannot be read.
    """
    spec = resolve_spec(config)
    mixture = _open_mixture(config, spec)
    held = _open_held(config, spec)
    identity = _identity(config, spec, mixture)
    generation = _find_generation(config, identity)
    state = _build_state(config, spec, device, load_weights=generation is None)
    if generation is not None:
        restore_state(state, generation)
    step = state.counters.step
    directory = config.run.dir
    trackers = open_trackers(config.track, directory, identity["recipe"], step)
    objective = _objective(config, spec)
    job = Job(
        config=config,
        state=state,
        objective=objective,
        mixture=mixture,
        held=held,
        machine=describe_machine(
            spec,
            config.data.sequence_length,
            peak_flops=config.precision.peak_flops,
            dtype=torch_dtype(config.precision.compute),
            device=device,
            recomputed=objective.recompute,
            statistics_pass=_has_statistics_pass(config, objective),
        ),
        device=device,
        metrics=MetricsLog(directory / "metrics.jsonl"),
        trackers=trackers,
        identity=identity,
        resumed_from=None if generation is None else step,
    )
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


def _find_generation(config: TrainConfig, identity: dict[str, Any]) -> Generation | None:
    directory = config.run.dir
    generation = latest_generation(directory / "checkpoints")
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


def _build_state(config: TrainConfig, spec: ModelSpec, device: torch.device, *, load_weights: bool) -> TrainState:
    dtype = torch_dtype(config.precision.weights)
    model = build_model(config.model, spec, seed=config.run.seed, dtype=dtype, device=device, load_weights=load_weights)
    torch.manual_seed(config.run.seed)
    balance = config.balance
    return TrainState(
        engine=SingleEngine(model, Optimizer(model, config.optimizer), device),
        alpha=_coefficients(balance, len(spec.moe_layer_ids)),
        guard=Guard(config.guard),
    )


def _coefficients(balance: BalanceConfig, num_layers: int) -> AdaptiveCoefficients:
    initial = balance.coefficient if balance.aux != "none" else 0.0
    return AdaptiveCoefficients(
        [initial] * num_layers,
        xi=balance.xi,
        alpha_max=balance.alpha_max,
        beta=balance.beta,
        adaptive=balance.adaptive and balance.aux != "none",
    )


def _objective(config: TrainConfig, spec: ModelSpec) -> Objective:
    balance, precision = config.balance, config.precision
    layers = {"none": 0, "all": spec.num_layers}.get(str(config.recompute), config.recompute)
    return Objective(
        aux=AuxLoss(balance.aux) if spec.moe else AuxLoss.NONE,
        global_statistics=balance.scope == "global",
        z_coefficient=balance.z_loss if spec.moe else 0.0,
        real_capacity=balance.capacity_factor if balance.capacity == "real" else None,
        compute=None if precision.compute == precision.weights else torch_dtype(precision.compute),
        recompute=range(int(layers)),
    )


def _has_statistics_pass(config: TrainConfig, objective: Objective) -> bool:
    several = (config.batch.micro_sequences or config.batch.sequences) < config.batch.sequences
    return several and objective.global_statistics and objective.aux is not AuxLoss.NONE


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
