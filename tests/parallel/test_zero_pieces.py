"""What ZeRO saves and restores: every element once, on any layout; and the bytes it holds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parallel.ranks import run_ranks
from parallel.zero_world import SETTINGS, World, box_index, group_of, slices_of, tied_names, zero_layout, zero_spec
from safetensors.torch import load, save
from torch import Tensor, nn

from skymoe.base.errors import CheckpointError
from skymoe.parallel.memory import zero_bytes
from skymoe.parallel.mesh import single_mesh
from skymoe.parallel.shards import ALIGNMENT, UNDIVIDED, plan_flats
from skymoe.parallel.zero import ZeroOptimizer
from skymoe.spec.layout import DispatchMode, ExpertAxis, Layout, ScheduleKind
from skymoe.spec.model import ModelSpec
from skymoe.weights.names import parameter_shapes
from skymoe.weights.slices import Box

Saved = dict[tuple[str, str], Tensor]
LAYOUTS = [
    zero_layout(1, 1, 1),
    zero_layout(2, 2, 1, schedule=ScheduleKind.ZERO_BUBBLE),
    zero_layout(1, 2, 3, expert=ExpertAxis.ETP),
    zero_layout(1, 3, 2, expert=ExpertAxis.EP, dispatch=DispatchMode.REPLICATED),
    zero_layout(3, 2, 1, schedule=ScheduleKind.INTERLEAVED),
]


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    tp, expert = draw(st.integers(1, 3)), draw(st.sampled_from(list(ExpertAxis)))
    most = 7 // tp if expert is ExpertAxis.EP else 5
    return zero_layout(
        draw(st.integers(1, 3)), draw(st.integers(1, most)), tp, expert=expert,
        schedule=draw(st.sampled_from(list(ScheduleKind))), dispatch=draw(st.sampled_from(list(DispatchMode))),
    )  # fmt: skip


@given(layouts(), st.booleans(), st.sampled_from([1, 500, 4096, 10**9]))
@settings(max_examples=40, deadline=None)
def test_over_all_ranks_every_element_is_saved_once(layout: Layout, tied: bool, shard_elements: int) -> None:
    spec = zero_spec(tie_embeddings=tied)
    shapes = {n: shape for n, shape in parameter_shapes(spec).items() if not n.endswith("expert_bias")}
    seen = {name: torch.zeros(shape, dtype=torch.int32) for name, shape in shapes.items()}
    for rank in range(layout.world_size):
        place = layout.coordinate(rank)
        owned = slices_of(spec, layout, place)
        for plan in plan_flats(owned, layout, place, tied=tied_names(spec), shard_elements=shard_elements):
            for portion in plan.portions():
                values = torch.arange(portion.size)
                views = [values[box.elements].view(box.shape)[box.within] for box in plan.boxes(portion)]
                assert torch.equal(torch.cat([view.reshape(-1) for view in views]).sort().values, values)
                for box, view in zip(plan.boxes(portion), views, strict=True):
                    target = seen[plan.slices[portion.parameter].name][box_index(box.whole)]
                    assert target.shape == view.shape
                    target += plan.counts(portion)
    assert all(bool((count == 1).all()) for count in seen.values())


@given(layouts(), st.sampled_from([1, 500, 4096, 10**9]))
@settings(max_examples=25, deadline=None)
def test_plan_of_the_buffers(layout: Layout, shard_elements: int) -> None:
    """Buckets fill the buffer, shards are equal and aligned, and what is partial lies first."""
    spec = zero_spec()
    for rank in range(layout.world_size):
        place = layout.coordinate(rank)
        for plan in plan_flats(
            slices_of(spec, layout, place), layout, place, tied=tied_names(spec), shard_elements=shard_elements
        ):
            unit = ALIGNMENT * plan.num_shards
            most = max(shard_elements, ALIGNMENT) * (UNDIVIDED if plan.num_shards == 1 else 1)
            assert [bucket.start for bucket in plan.buckets[1:]] == [bucket.stop for bucket in plan.buckets[:-1]]
            assert (plan.buckets[0].start, plan.buckets[-1].stop) == (0, plan.size) and plan.size % unit == 0
            assert all(bucket.state.stop - bucket.state.start <= most for bucket in plan.buckets)
            assert plan.buckets[-1].state.stop == plan.state_size == plan.size // plan.num_shards
            ends = [start + item.num_elements for start, item in zip(plan.offsets, plan.slices, strict=True)]
            assert all(end <= start for end, start in zip(ends, (*plan.offsets[1:], plan.size), strict=True))
            for item, start in zip(plan.slices, plan.offsets, strict=True):
                assert item.partial == (start < plan.num_partial) and start % ALIGNMENT == 0
            padding = set(range(plan.size)).difference(*map(range, plan.offsets, ends))
            own = {at for item in plan.portions() if plan.counts(item) for at in range_of(plan.place(item))}
            runs = [at for run in plan.counted() for at in range_of(run)]
            assert own <= set(runs) <= own | padding and len(runs) == len(set(runs))


def range_of(part: slice) -> range:
    return range(part.start, part.stop)


def train_and_save(spec: ModelSpec, layout: Layout, weights: torch.dtype) -> bytes:
    world = World(spec, layout, weights=weights, shard_bytes=2048)
    for step in range(2):
        world.backward(step, micros=1)
        world.zero.update(0.01, float(world.zero.gradient_norm()))
    return packed(world)  # not settled: what a rank saves are its own shards, and those are there


def packed(world: World) -> bytes:
    """The pieces of a rank as one safetensors file: descriptors of many small tensors would exceed a pipe's limits."""
    return save({json.dumps(piece[:4]): piece.tensor.contiguous() for piece in world.zero.pieces()})


def assembled(ranks: list[bytes]) -> Saved:
    """Whole tensors from the pieces of all ranks; every element once."""
    saved: Saved = {}
    counts: Counter[tuple[str, str]] = Counter()
    for key, tensor in (item for rank in ranks for item in load(rank).items()):
        stem, name, shape, box = json.loads(key)
        saved.setdefault((stem, name), torch.empty(shape, dtype=tensor.dtype))[box_index(box)] = tensor
        counts[stem, name] += tensor.numel()
    assert all(saved[key].numel() == count for key, count in counts.items())
    return saved


def restore_and_tell(spec: ModelSpec, layout: Layout, weights: torch.dtype, whole: bytes) -> bytes:
    """Restores over other weights; every rank's weights are whole, also where another rank restored them."""
    world = World(spec, layout, weights=weights, seed=1)
    saved = load(whole)

    def read(stem: str, name: str, box: Box) -> Tensor | None:
        found = saved.get(f"{stem}/{name}")
        return None if found is None else found[box_index(box)]

    world.zero.restore(read)
    for name, (parameter, item) in world.items().items():
        for piece in item.pieces:
            assert torch.equal(parameter[box_index(piece.local)], saved[f"model/{name}"][box_index(piece.whole)]), name
    return packed(world)


@pytest.mark.parametrize(
    ("one", "other", "weights"), [(1, 2, torch.bfloat16), (3, 4, torch.float32), (4, 0, torch.bfloat16)]
)
def test_saved_on_one_layout_restored_on_another(one: int, other: int, weights: torch.dtype) -> None:
    spec, before, after = zero_spec(), LAYOUTS[one], LAYOUTS[other]
    saved = assembled(run_ranks(before.world_size, train_and_save, spec, before, weights))
    names = {n for n in parameter_shapes(spec) if not n.endswith("expert_bias")}
    suffixes = {"/exp_avg", "/exp_avg_sq", "/step"} | ({"/master"} if weights is torch.bfloat16 else set())
    assert {name for stem, name in saved if stem == "model"} == names
    assert {name for stem, name in saved if stem == "optimizer"} == {n + s for n in names for s in suffixes}
    assert all(float(value) == 2 for (_, name), value in saved.items() if name.endswith("/step"))
    whole = save({"/".join(key): tensor for key, tensor in saved.items()})
    again = assembled(run_ranks(after.world_size, restore_and_tell, spec, after, weights, whole))
    assert again.keys() == saved.keys()
    assert all(torch.equal(value, saved[key]) for key, value in again.items())


def test_a_checkpoint_without_moments_or_master_starts_fresh() -> None:
    spec, layout = zero_spec(), zero_layout(1, 1, 1)
    trained = World(spec, layout, weights=torch.bfloat16)
    trained.backward(0)
    trained.zero.update(0.01, float(trained.zero.gradient_norm()))
    saved = {(piece.stem, piece.name): piece.tensor.clone() for piece in trained.zero.pieces()}
    assert saved["optimizer", "norm.weight/exp_avg"].any()
    del saved["optimizer", "norm.weight/exp_avg_sq"]
    trained.zero.restore(lambda stem, name, box: None if "master" in name else saved.get((stem, name)))
    again = {piece.name: piece.tensor for piece in trained.zero.pieces()}
    assert not any(again[f"norm.weight/{part}"].any() for part in ("exp_avg", "exp_avg_sq", "step"))
    assert torch.equal(again["embed.weight/exp_avg"], saved["optimizer", "embed.weight/exp_avg"])
    assert torch.equal(again["norm.weight/master"], saved["model", "norm.weight"].float())


@pytest.mark.parametrize(
    ("values", "told"), [(None, "no such weights"), (torch.zeros(3), r"\[3\]"), (torch.zeros(20).half(), "float16")]
)
def test_what_does_not_fit_is_refused(values: Tensor | None, told: str) -> None:
    world = World(zero_spec(), zero_layout(1, 1, 1))
    saved = {(piece.stem, piece.name): piece.tensor.clone() for piece in world.zero.pieces()}
    with pytest.raises(CheckpointError, match=told):
        world.zero.restore(lambda stem, name, box: values if name == "norm.weight" else saved[stem, name])


def told_bytes(spec: ModelSpec, layout: Layout) -> None:
    for weights, gradients in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        hold_bytes(spec, layout, weights, gradients)


def hold_bytes(spec: ModelSpec, layout: Layout, weights: torch.dtype, gradients: torch.dtype) -> None:
    world = World(spec, layout, weights=weights, gradients=gradients, shard_bytes=3000)
    place = world.mesh.coordinate
    said = zero_bytes(
        slices_of(spec, layout, place), layout, place, tied=tied_names(spec), weight_bytes=weights.itemsize,
        gradient_bytes=gradients.itemsize, shard_bytes=3000,
    )  # fmt: skip
    assert world.zero.allocated() == said
    views = [parameter.untyped_storage().data_ptr() for parameter, _ in world.items().values()]
    assert set(views) == {flat.weights.untyped_storage().data_ptr() for flat, _ in world.zero._flats}
    elements = sum(item.num_elements for _, item in world.items().values())
    padding = ALIGNMENT * (len(world.items()) + layout.dp * len(world.zero._flats))
    assert elements * weights.itemsize <= said.weights <= (elements + padding) * weights.itemsize
    assert (said.master == 0) == (weights is torch.float32)


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[2], LAYOUTS[4]], ids=["one", "etp", "interleaved"])
def test_bytes_are_those_of_the_formula(layout: Layout) -> None:
    run_ranks(layout.world_size, told_bytes, zero_spec(), layout)


def test_on_the_meta_device_it_has_sizes_only() -> None:
    """A rank in the middle of a world that is not there, for the dry run."""
    spec, layout = zero_spec(), zero_layout(2, 5, 3)
    place = layout.coordinate(17)
    owned = slices_of(spec, layout, place)
    stages = {
        stage: {
            name: (nn.Parameter(torch.empty(item.shape, device="meta")), item)
            for name, item in slices.items()
            if not item.is_buffer
        }
        for stage, slices in owned.items()
    }
    mesh = replace(single_mesh(layout, torch.device("meta")), coordinate=place)
    zero = ZeroOptimizer(stages, mesh, SETTINGS, group_of, tied=tied_names(spec), gradients=torch.bfloat16)
    said = zero_bytes(owned, layout, place, tied=tied_names(spec), weight_bytes=4, gradient_bytes=2)
    assert zero.allocated() == said and said.weights == 2 * said.gradients > 0
    assert all(piece.tensor.is_meta for piece in zero.pieces())


def test_plan_and_formula_need_no_torch() -> None:
    code = "import sys, skymoe.parallel.memory; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
