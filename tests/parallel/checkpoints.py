"""States for checkpoint tests: every tensor of a small odd model is a function of its name and the step."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch

from skymoe.base.config import check_config
from skymoe.parallel.config import ParallelConfig, layout_of
from skymoe.spec.layout import Layout
from skymoe.spec.model import Architecture, GateNormSpec, ModelSpec, MoESpec, QkNorm
from skymoe.weights.division import divide
from skymoe.weights.names import parameter_shapes
from skymoe.weights.pieces import SavedPiece
from skymoe.weights.slices import Box

# Nothing divides: 3 layers (the first dense), 3 key/value heads, 5 experts, vocabulary 23.
SPEC = ModelSpec(
    architecture=Architecture.SKYMOE,
    vocab_size=23,
    hidden_size=12,
    num_layers=3,
    ffn_size=20,
    num_heads=6,
    num_kv_heads=3,
    head_dim=4,
    qkv_bias=True,
    o_bias=True,
    qk_norm=QkNorm.HEAD,
    moe=MoESpec(num_experts=5, top_k=2, ffn_size=10, gate_norm=GateNormSpec(), expert_bias=True, shared_ffn_size=6),
    moe_layers=(1, 2),
)

State = dict[str, dict[str, torch.Tensor]]


def layout(world_size: int, **keys: object) -> Layout:
    """What a recipe's section `parallel` gives."""
    return layout_of(check_config(ParallelConfig, keys), SPEC, world_size=world_size)


LAYOUTS = {
    "1": layout(1),
    "PP2": layout(2, pp=2),
    "EDP2": layout(2, tp=2),
    "DP2": layout(2, dp=2),
    "EP2": layout(2, dp=2, expert="ep", dispatch="R"),
    "ETP2": layout(2, dp=2, expert="etp"),
    "PP3": layout(3, pp=3, split=(0.5, 1.5, 1)),
    "EDP3": layout(3, tp=3),
    "PP2xEDP2": layout(4, pp=2, tp=2, schedule="zbv"),
    "ETP2xDP2": layout(4, dp=2, tp=2, expert="etp"),
    "EP4": layout(4, dp=2, tp=2, expert="ep"),
}


def state_of(step: int) -> State:
    """The whole state of `step`: two dtypes, moments, scalars, generator bytes."""
    model = {name: _values(name, shape, step) for name, shape in parameter_shapes(SPEC).items()}
    optimizer = {}
    for name, weight in model.items():
        if not name.endswith("expert_bias"):
            for moment in ("exp_avg", "exp_avg_sq"):
                optimizer[f"{name}/{moment}"] = _values(f"{name}/{moment}", tuple(weight.shape), step)
            optimizer[f"{name}/step"] = torch.tensor(float(step))
    model = {name: weight if name.endswith("expert_bias") else weight.bfloat16() for name, weight in model.items()}
    rng = {"cpu": torch.arange(101, dtype=torch.uint8) + step}
    return {"model": model, "optimizer": optimizer, "rng": rng}


def pieces_of(state: State, target: Layout, rank: int) -> Iterator[SavedPiece]:
    """What `rank` of `target` saves of `state`."""
    shares = divide(SPEC, target)
    for stem, tensors in state.items():
        for name, tensor in tensors.items():
            for owner, box in shares.get(name.partition("/")[0], [(0, ((0, 101),))]):
                shape = tuple(tensor.shape)
                if owner == rank and (shape or all(start == 0 for start, _ in box)):
                    own = box if shape else ()
                    yield SavedPiece(stem, name, shape, own, part(tensor, own))


def part(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """The elements of a box."""
    return tensor[tuple(slice(*one) for one in box)]


def _values(name: str, shape: tuple[int, ...], step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}:{step}".encode()))
    return torch.randn(shape, generator=generator)
