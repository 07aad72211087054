"""One case of the equivalence matrix: three optimizer steps on real gloo ranks against the same steps on one process.

Compared are the loss of every step, every gradient (through the first moments after the first step, which are a
tenth of the clipped gradients), all weights and second moments after three steps, alpha and the drop rates. The model
has what makes divisions hard: 7 layers of which one is dense, 3 key/value groups, 6 experts and a shared one, gate
normalization, pads in the data, odd sizes throughout. One process runs the plain path (`SingleEngine`), which shares
neither modules nor optimizer nor schedule with the divided one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import torch
from parallel.covering import Case
from parallel.ranks import run_ranks
from torch import Tensor

from skymoe.base.config import check_config
from skymoe.data.packing import IGNORE, Batch
from skymoe.model.init import initialize
from skymoe.model.transformer import Transformer
from skymoe.ops.balance import AdaptiveCoefficients
from skymoe.parallel.config import layout_of
from skymoe.parallel.mesh import build_mesh
from skymoe.spec.model import Architecture, GateNormSpec, ModelSpec, MoESpec
from skymoe.train.batches import StepBatch, micro_batch
from skymoe.train.config import BalanceConfig, TrainConfig
from skymoe.train.engine import Engine, SingleEngine
from skymoe.train.guard import Guard
from skymoe.train.optim import Optimizer
from skymoe.train.ranks import RanksEngine
from skymoe.train.state import TrainState
from skymoe.train.step import train_step
from skymoe.train.wiring import objective_of
from skymoe.weights.slices import Box

STEPS, SEQUENCES, LENGTH, SEED = 3, 6, 10, 5
CAPACITY_FACTOR = 1.0

SPEC = ModelSpec(
    architecture=Architecture.SKYMOE, vocab_size=53, hidden_size=20, num_layers=7, ffn_size=28, num_heads=6,
    num_kv_heads=3, head_dim=4, max_position=64, init_std=0.15, qkv_bias=True, moe_layers=(0, 2, 3, 4, 5, 6),
    moe=MoESpec(num_experts=6, top_k=2, ffn_size=12, gate_norm=GateNormSpec(), shared_ffn_size=10),
)  # fmt: skip


def recipe(
    case: Case | None, capacity: str, spec: ModelSpec = SPEC, dtype: str = "float32", **more: Any
) -> TrainConfig:
    """The recipe of a case; None is one process. `more`: sections `balance` and `batch`, the rest for `parallel`."""
    balance, batch = more.pop("balance", {}), more.pop("batch", {})
    parallel: dict[str, Any] = {}
    recompute: Any = "none"
    if case is not None:
        parallel = {axis: getattr(case, axis) for axis in ("pp", "tp", "dp", "expert", "dispatch", "schedule")} | more
        layout = layout_of(
            TrainConfig.model_fields["parallel"].default.model_copy(update=parallel), spec, world_size=case.world_size
        )
        layers = [len({half.layer for half in layout.halves(stage)}) for stage in range(layout.num_stages)]
        some = [stage % (count + 1) for stage, count in enumerate(layers, 1)]
        recompute = {"none": "none", "all": "all", "some": some}[case.recompute]
    return check_config(
        TrainConfig,
        {
            "run": {"dir": "unused", "seed": SEED},
            "model": {"preset": "skywork-moe"},  # not read here: the spec is given
            "data": {"train": [{"path": "unused"}], "sequence_length": LENGTH},
            "steps": STEPS,
            "batch": {"sequences": SEQUENCES, "micro_sequences": 1, **batch},
            "optimizer": {"lr": 1e-2, "eps": 1e-4, "clip": 0.5},
            "balance": {
                "coefficient": 0.05, "alpha_max": 0.05, "beta": 0.5, "capacity_factor": CAPACITY_FACTOR,
                "capacity": "real" if capacity == "capacity" else "virtual", **balance,
            },
            "precision": {"weights": dtype, "compute": dtype, "peak_flops": 1e9},
            "parallel": parallel,
            "recompute": recompute,
        }
    )  # fmt: skip


def step_batch(step: int, replica: tuple[int, int], spec: ModelSpec, size: int) -> StepBatch:
    """The same tokens for every layout; of 6 sequences the replica's share is made into micro-batches of `size`."""
    draw = np.random.default_rng(100 + step)
    tokens = draw.integers(0, spec.vocab_size, (SEQUENCES, LENGTH))
    targets = draw.integers(0, spec.vocab_size, (SEQUENCES, LENGTH))
    valid = np.arange(LENGTH)[None] < np.array([LENGTH, LENGTH, LENGTH - 3, LENGTH, LENGTH - 1, LENGTH])[:, None]
    targets[~valid] = IGNORE
    positions, documents = np.broadcast_to(np.arange(LENGTH), tokens.shape), np.zeros_like(tokens)
    rows = Batch(tokens, targets, documents, positions, valid, np.zeros(SEQUENCES, np.int64))
    index, count = replica
    share = SEQUENCES // count
    micros = tuple(
        micro_batch(rows.rows(start, start + size), False, torch.device("cpu"), keep_mask=True)
        for start in range(index * share, (index + 1) * share, size)
    )
    num_targets = int(np.count_nonzero(targets != IGNORE))
    return StepBatch(micros=micros, num_targets=num_targets, num_tokens=int(valid.sum()), num_samples=SEQUENCES)


def take_steps(engine: Engine, config: TrainConfig, replica: tuple[int, int], spec: ModelSpec = SPEC) -> dict[str, Any]:
    """Three steps; what is known on every rank."""
    balance: BalanceConfig = config.balance
    alpha = AdaptiveCoefficients(
        [balance.coefficient] * len(spec.moe_layer_ids), balance.xi, balance.alpha_max, balance.beta
    )
    state = TrainState(engine=engine, alpha=alpha, guard=Guard(config.guard))
    objective = objective_of(config, spec)
    told: dict[str, Any] = {"loss": [], "norm": [], "drop": [], "moments": None}
    for step in range(STEPS):
        result = train_step(
            state,
            step_batch(step, replica, spec, config.batch.micro_sequences or SEQUENCES),
            lr=config.optimizer.lr,
            objective=objective,
            balance=balance,
        )
        told["loss"].append(result.loss)
        told["norm"].append(result.grad_norm)
        told["drop"].append(result.drop_rate_L)
        if step == 0:
            told["moments"] = pieces_of(engine)
    told["alpha"] = list(alpha.alpha_L)
    told["gates"] = [list(figures) for figures in engine.gate_figures(result.sums)]
    told["state"] = pieces_of(engine)
    return told


def pieces_of(engine: Engine) -> list[tuple[str, tuple[int, ...], Box, Tensor]]:
    """Weights and moments here: name, whole shape, box, values."""
    if isinstance(engine, RanksEngine):
        engine.optimizer.settle()
        return [(p.name, p.whole_shape, p.box, p.tensor.clone()) for p in engine.optimizer.pieces()]
    assert isinstance(engine, SingleEngine)
    tensors = dict(engine.model.named_parameters()) | engine.optimizer.tensors()
    return [
        (name, tuple(tensor.shape), tuple((0, size) for size in tensor.shape), tensor.detach().clone())
        for name, tensor in tensors.items()
    ]


def on_rank(case: Case, spec: ModelSpec = SPEC, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What one rank of a case reports."""
    config = recipe(case, case.capacity, spec, **more or {})
    layout = layout_of(config.parallel, spec, world_size=case.world_size, recompute=config.recompute)
    mesh = build_mesh(layout, torch.device("cpu"))
    engine = RanksEngine(config, spec, mesh, load_weights=True)
    return take_steps(engine, config, (mesh.coordinate.dp, layout.dp), spec)


def reference(capacity: str, spec: ModelSpec = SPEC, **more: Any) -> dict[str, Any]:
    """One process, on the same recipe but for its section `parallel`."""
    return _reference(capacity, spec, json.dumps({key: more[key] for key in ("balance", "batch") if key in more}))


@lru_cache
def _reference(capacity: str, spec: ModelSpec, more: str) -> dict[str, Any]:
    config = recipe(None, capacity, spec, **json.loads(more))
    model = initialize(Transformer(spec), SEED)
    engine = SingleEngine(model, Optimizer(model, config.optimizer), torch.device("cpu"))
    return take_steps(engine, config, (0, 1), spec)


def compare(case: Case, spec: ModelSpec = SPEC, **more: Any) -> dict[str, Any]:
    """The worst relative errors of a case: loss, any gradient, weight or moment (by norm of the tensor), alpha."""
    return errors(case, run_ranks(case.world_size, on_rank, case, spec, more), spec, **more)


def errors(case: Case, found: list[dict[str, Any]], spec: ModelSpec = SPEC, **more: Any) -> dict[str, Any]:
    """What the ranks of a case found, against one process."""
    expected, first = reference(case.capacity, spec, **more), found[0]
    for other in found[1:]:
        for key in ("loss", "norm", "drop", "alpha", "gates"):
            assert other[key] == first[key], f"ranks differ in {key}"
    gradients = _errors(expected["moments"], [one["moments"] for one in found], "/exp_avg")
    after = _errors(expected["state"], [one["state"] for one in found], "")
    weights = {name: error for name, error in after.items() if "/" not in name}
    return {
        "case": case,
        "moments": max(error for name, error in after.items() if "/" in name),
        "loss": max(_relative(a, b) for a, b in zip(first["loss"], expected["loss"], strict=True)),
        "norm": max(_relative(a, b) for a, b in zip(first["norm"], expected["norm"], strict=True)),
        "gradients": max(gradients.values()),
        "gradients_name": max(gradients, key=lambda name: gradients[name]),
        "weights": max(weights.values()),
        "weights_name": max(weights, key=lambda name: weights[name]),
        "alpha": max((_relative(a, b) for a, b in zip(first["alpha"], expected["alpha"], strict=True)), default=0.0),
        "drop": max(
            (abs(a - b) for a, b in zip(chain(*first["drop"]), chain(*expected["drop"]), strict=True)), default=0.0
        ),
    }


def whole_tensors(ranks: list[list[tuple[str, tuple[int, ...], Box, Tensor]]]) -> dict[str, Tensor]:
    """Tensors from the pieces of all ranks; every element must come from exactly one."""
    tensors: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for pieces in ranks:
        for name, shape, box, values in pieces:
            if name not in tensors:
                tensors[name], counts[name] = torch.zeros(shape), torch.zeros(shape, dtype=torch.int32)
            index = tuple(slice(*extent) for extent in box)
            tensors[name][index] = values.float()
            counts[name][index] += 1
    for name, count in counts.items():
        assert bool((count == 1).all()), f"{name}: elements saved {count.unique().tolist()} times"
    return tensors


def _errors(expected: Any, found: Any, suffix: str) -> dict[str, float]:
    ours, theirs = whole_tensors(found), whole_tensors([expected])
    assert ours.keys() == theirs.keys()
    names = [name for name in theirs if name.endswith(suffix)]
    return {name: float((ours[name] - theirs[name]).norm() / theirs[name].norm().clamp_min(1e-12)) for name in names}


def _relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(b), 1e-12)
