"""The parts of a Job that depend on how many ranks there are: mesh, engine, machine; and what the recipe minimises."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from skymoe.ops.balance import AdaptiveCoefficients, AuxLoss
from skymoe.parallel.collectives import sum_forward
from skymoe.parallel.config import layout_of
from skymoe.parallel.launch import World
from skymoe.parallel.mesh import Mesh, build_mesh
from skymoe.plan.orders import check_micro_batches
from skymoe.spec.layout import Half
from skymoe.spec.model import ModelSpec
from skymoe.spec.utilisation import recomputed_parts
from skymoe.train.build import build_model
from skymoe.train.config import BalanceConfig, TrainConfig
from skymoe.train.engine import Engine, SingleEngine
from skymoe.train.guard import Guard
from skymoe.train.objective import Objective
from skymoe.train.optim import Optimizer
from skymoe.train.planned_batch import warn_of_other_batch
from skymoe.train.ranks import RanksEngine, micro_batches
from skymoe.train.state import TrainState
from skymoe.train.throughput import Machine, describe_machine
from skymoe.weights.buffers import torch_dtype


def find_mesh(config: TrainConfig, spec: ModelSpec, world: World) -> Mesh | None:
    """Where this rank stands; None on one process. Asking one process for more is an error."""
    layout = layout_of(config.parallel, spec, world_size=world.size, recompute=config.recompute)
    if not world.is_distributed:
        return None
    check_micro_batches(layout, micro_batches(config.batch, layout))
    if world.rank == 0:
        warn_of_other_batch(config, layout)
    return build_mesh(layout, world.device)


def measure_machine(
    config: TrainConfig, spec: ModelSpec, mesh: Mesh | None, device: torch.device, objective: Objective
) -> Machine:
    """FLOP counts, and the peak of all devices together: every rank measures its own."""
    again: Iterable[int | Half] = objective.recompute if mesh is None else recomputed_parts(mesh.layout)
    machine = describe_machine(
        spec,
        config.data.sequence_length,
        peak_flops=config.precision.peak_flops,
        dtype=torch_dtype(config.precision.compute),
        device=device,
        recomputed=again,
        statistics_pass=_has_statistics_pass(config, objective, 1 if mesh is None else mesh.layout.dp),
    )
    if mesh is None:
        return machine
    peaks = torch.zeros(mesh.layout.world_size, dtype=torch.float64, device=device)
    peaks[mesh.rank] = machine.peak_flops
    return machine.of_world(sum_forward(peaks, mesh.world).tolist())


def build_state(
    config: TrainConfig, spec: ModelSpec, device: torch.device, mesh: Mesh | None, *, load_weights: bool
) -> TrainState:
    """A run's state at step 0; without `load_weights` its values are arbitrary: a checkpoint follows."""
    engine: Engine
    if mesh is not None:
        engine = RanksEngine(config, spec, mesh, load_weights=load_weights)
    else:
        dtype, seed = torch_dtype(config.precision.weights), config.run.seed
        model = build_model(config.model, spec, seed=seed, dtype=dtype, device=device, load_weights=load_weights)
        optimizer = Optimizer(model, config.optimizer)
        engine = SingleEngine(model, optimizer, device, asynchronous=config.checkpoint.asynchronous)
    torch.manual_seed(config.run.seed)
    balance = config.balance
    return TrainState(
        engine=engine,
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


def objective_of(config: TrainConfig, spec: ModelSpec) -> Objective:
    """What the recipe minimises. On many ranks the layout says what is recomputed."""
    balance, precision = config.balance, config.precision
    asked = sum(config.recompute) if isinstance(config.recompute, tuple) else config.recompute
    layers = {"none": 0, "all": spec.num_layers}.get(str(asked), asked)
    return Objective(
        aux=AuxLoss(balance.aux) if spec.moe else AuxLoss.NONE,
        global_statistics=balance.scope == "global",
        z_coefficient=balance.z_loss if spec.moe else 0.0,
        real_capacity=balance.capacity_factor if balance.capacity == "real" else None,
        compute=None if precision.compute == precision.weights else torch_dtype(precision.compute),
        recompute=range(int(layers)),
    )


def _has_statistics_pass(config: TrainConfig, objective: Objective, replicas: int) -> bool:
    own = config.batch.sequences // replicas
    several = (config.batch.micro_sequences or own) < own
    return several and objective.global_statistics and objective.aux is not AuxLoss.NONE
