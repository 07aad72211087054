"""ZeRO against one process: the same norm, the same clipping, the same weights and moments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from parallel.ranks import run_ranks
from parallel.zero_world import SETTINGS, World, box_index, group_of, zero_layout, zero_spec
from torch import Tensor, nn

from skymoe.spec.layout import DispatchMode, ExpertAxis, ScheduleKind
from skymoe.train.config import OptimizerConfig
from skymoe.train.optim import Optimizer

LAYOUTS = [
    {"pp": 1, "dp": 1, "tp": 1},
    {"pp": 1, "dp": 2, "tp": 1},
    {"pp": 1, "dp": 3, "tp": 1, "schedule": ScheduleKind.INTERLEAVED},
    {"pp": 2, "dp": 2, "tp": 1, "schedule": ScheduleKind.ZERO_BUBBLE},
    {"pp": 1, "dp": 2, "tp": 2, "expert": ExpertAxis.EP},
    {"pp": 1, "dp": 2, "tp": 3, "expert": ExpertAxis.ETP, "dispatch": DispatchMode.REPLICATED},
    {"pp": 2, "dp": 3, "tp": 1},
    {"pp": 2, "dp": 2, "tp": 2, "schedule": ScheduleKind.INTERLEAVED},
]


def three_steps(sizes: dict[str, Any], *, overlap: bool, shard_bytes: int) -> dict[str, Tensor]:
    """This rank holds its weights and moments to torch's AdamW on the summed gradients, bit for bit."""
    world = World(zero_spec(), zero_layout(**sizes), overlap=overlap, shard_bytes=shard_bytes)
    copies = {name: nn.Parameter(parameter.detach().clone()) for name, (parameter, _) in world.items().items()}
    adamw = reference(copies)
    for step in range(3):
        world.backward(step)
        norm = world.zero.gradient_norm()
        assert torch.allclose(norm, world.whole_norm(step), rtol=1e-14)
        assert torch.equal(norm, world.zero.gradient_norm())  # asking twice adds nothing
        world.zero.update(lr := 0.01 / (step + 1), float(norm))
        reference_step(adamw, copies, world.totals(step), lr, float(norm))
    world.zero.settle()
    for name, (parameter, _) in world.items().items():
        assert torch.equal(parameter, copies[name]), name
    hold_moments(world, adamw, copies)
    return {"norm": norm, **{name: parameter.detach().clone() for name, (parameter, _) in world.items().items()}}


def with_and_without_overlap(sizes: dict[str, Any]) -> dict[str, Tensor]:
    """Many buckets, which travel behind other work or do not: the same bits."""
    behind = three_steps(sizes, overlap=True, shard_bytes=1024)
    waited = three_steps(sizes, overlap=False, shard_bytes=1024)
    assert all(torch.equal(value, waited[name]) for name, value in behind.items())
    return behind


def reference(copies: dict[str, nn.Parameter]) -> torch.optim.AdamW:
    groups = []
    for name, copy in copies.items():
        settings = group_of(name, copy)
        groups.append({"params": [copy], "weight_decay": settings.weight_decay, "lr_ratio": settings.lr_ratio})
    return torch.optim.AdamW(groups, betas=SETTINGS.betas, eps=SETTINGS.eps, fused=True)


def reference_step(
    adamw: torch.optim.AdamW, copies: dict[str, nn.Parameter], totals: dict[str, Tensor], lr: float, norm: float
) -> None:
    assert norm > SETTINGS.clip  # so that clipping is tested
    for name, copy in copies.items():
        copy.grad = totals[name].mul_(SETTINGS.clip / norm)
    for group in adamw.param_groups:
        group["lr"] = lr * group["lr_ratio"]
    adamw.step()


def hold_moments(world: World, adamw: torch.optim.AdamW, copies: dict[str, nn.Parameter]) -> None:
    for flat, state in world.zero._flats:
        for number, portion in enumerate(state.portions):
            found = adamw.state[copies[flat.plan.slices[portion.parameter].name]]
            part = slice(portion.start, portion.start + portion.size)
            assert torch.equal(state.exp_avg[portion.state], found["exp_avg"].flatten()[part])
            assert torch.equal(state.exp_avg_sq[portion.state], found["exp_avg_sq"].flatten()[part])
            assert torch.equal(state.steps[number], found["step"])


@pytest.mark.parametrize("sizes", LAYOUTS, ids=lambda sizes: "-".join(map(str, sizes.values())))
def test_three_steps_equal_one_process(sizes: dict[str, Any]) -> None:
    ranks = sizes["pp"] * sizes["dp"] * sizes["tp"]
    found = run_ranks(ranks, with_and_without_overlap, sizes)
    assert all(torch.equal(one["norm"], found[0]["norm"]) for one in found)


def narrow(weights: torch.dtype, gradients: torch.dtype) -> None:
    """Formats of weights and gradients, each against AdamW on an fp32 copy."""
    world = World(zero_spec(), zero_layout(1, 2, 1), weights=weights, gradients=gradients)
    copies = {name: nn.Parameter(parameter.detach().float()) for name, (parameter, _) in world.items().items()}
    adamw = reference(copies)
    for step in range(3):
        world.backward(step)
        norm = float(world.zero.gradient_norm())
        assert norm == pytest.approx(float(world.whole_norm(step)), rel=1e-14)
        world.zero.update(0.01, norm)
        reference_step(adamw, copies, world.totals(step), 0.01, norm)
    world.zero.settle()
    for name, (parameter, _) in world.items().items():
        assert parameter.dtype == weights and parameter.grad.dtype == gradients and not parameter.grad.any()
        assert torch.equal(parameter, copies[name].to(weights)), name


@pytest.mark.parametrize("gradients", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_formats_of_weights_and_gradients(weights: torch.dtype, gradients: torch.dtype) -> None:
    run_ranks(2, narrow, weights, gradients)


def not_a_number(bad_rank: int) -> list[float]:
    """One rank has a NaN, then infinity, then a step that all is well again."""
    world = World(zero_spec(), zero_layout(2, 2, 2))
    norms, before = [], {name: parameter.detach().clone() for name, (parameter, _) in world.items().items()}
    for step, value in enumerate([float("nan"), float("inf")]):
        world.backward(step, poison=value if world.mesh.rank == bad_rank else 0.0)
        norms.append(float(world.zero.gradient_norm()))
        world.zero.drop_gradients()
    assert all(torch.equal(parameter, before[name]) for name, (parameter, _) in world.items().items())
    world.backward(2)
    norms.append(float(world.zero.gradient_norm()))
    assert norms[-1] == pytest.approx(float(world.whole_norm(2)), rel=1e-14)
    return norms


def test_not_a_number_on_one_rank_is_seen_by_all_and_a_dropped_step_leaves_no_trace() -> None:
    for norms in run_ranks(8, not_a_number, 5):
        assert norms[0] != norms[0] and norms[1] == float("inf")


class Named(nn.Module):
    """Parameters that go by the names of a whole model."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.found = parameters
        for name, parameter in parameters.items():
            self.register_parameter(name.replace(".", "/"), parameter)

    def named_parameters(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self.found.items())


def test_a_world_of_one_is_the_optimizer_of_train() -> None:
    world = World(zero_spec(), zero_layout(1, 1, 1))
    config = OptimizerConfig(betas=SETTINGS.betas, eps=SETTINGS.eps, clip=1.0, weight_decay=0.1, router_lr_ratio=0.5)
    plain = {name: nn.Parameter(parameter.detach().clone()) for name, (parameter, _) in world.items().items()}
    twin = Optimizer(Named(plain), config)
    for step in range(3):
        world.backward(step)
        for name, gradient in world.totals(step).items():
            plain[name].grad = gradient
        norm = float(world.zero.gradient_norm())
        assert norm == pytest.approx(float(twin.gradient_norm()), rel=1e-6)
        world.zero.update(0.01, norm)
        twin.update(0.01, norm)
    state = twin.tensors()
    for piece in world.zero.pieces():
        whole = plain[piece.name] if piece.stem == "model" else state[piece.name]
        assert torch.equal(piece.tensor, whole[box_index(piece.box)]), piece.name
    assert {piece.name for piece in world.zero.pieces()} == plain.keys() | state.keys()


def test_gradients_set_anew_are_noticed() -> None:
    world = World(zero_spec(), zero_layout(1, 1, 1))
    world.items()["norm.weight"][0].grad = None
    with pytest.raises(AssertionError):
        world.zero.gradient_norm()
