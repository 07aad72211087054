"""The pipeline on real ranks against one process: outputs, losses, every gradient, callbacks, order of work."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parallel.ranks import run_ranks
from torch import Tensor, nn

from skymoe.base.errors import ConfigError, TrainingError
from skymoe.model.linear import Linear
from skymoe.parallel.attach import attach
from skymoe.parallel.deferred import DeferredWeights, defer_weights
from skymoe.parallel.mesh import Mesh, build_mesh, single_mesh
from skymoe.parallel.pipeline import Pipeline
from skymoe.plan.orders import order_of
from skymoe.spec.layout import Coordinate, Layout, ScheduleKind
from skymoe.spec.split import Split

ROWS, SIZE, INPUTS = 5, 8, 3
ONE, INTERLEAVED, ZBV = ScheduleKind.ONE_F_ONE_B, ScheduleKind.INTERLEAVED, ScheduleKind.ZERO_BUBBLE


class Block(nn.Module):
    """A residual layer with an auxiliary loss on what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Linear(SIZE, 2 * SIZE, bias=True), Linear(2 * SIZE, SIZE)
        self.scale = nn.Parameter(torch.empty(SIZE))

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        y_ND = self.down(F.silu(self.up(x_ND * self.scale)))
        return x_ND + y_ND, 0.1 * y_ND.square().mean()


class Net(nn.Module):
    """Embedding, residual layers, and a head that lives in the loss."""

    def __init__(self, num_layers: int, seed: int = 0) -> None:
        super().__init__()
        self.embed = Linear(INPUTS, SIZE)
        self.layers = nn.ModuleList(Block() for _ in range(num_layers))
        self.head = Linear(SIZE, 2)
        self.double()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.5, generator=generator)


class Stages:
    """The forward of `Net`, cut as a layout says; counts its calls."""

    def __init__(self, net: Net, layout: Layout) -> None:
        self.net, self.layout = net, layout
        self.calls: dict[int, int] = {}

    def forward(self, stage: int, x_ND: Tensor | None, micro: dict[str, Any]) -> Tensor:
        self.calls[stage] = self.calls.get(stage, 0) + 1
        y_ND = self.net.embed(micro["input"]) if x_ND is None else x_ND
        for layer in self.layout.stages.part(stage):
            y_ND, aux = self.net.layers[layer](y_ND)
            y_ND = attach(y_ND, aux)
        return y_ND

    def loss(self, y_ND: Tensor, micro: dict[str, Any]) -> Tensor:
        return (self.net.head(y_ND) - micro["target"]).square().sum()


def make_micros(count: int, rows: int = ROWS) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    return [{"input": draw(rows, INPUTS), "target": draw(rows, 2)} for _ in range(count)]


def reference(num_layers: int, micros: list[dict[str, Any]]) -> tuple[Tensor, dict[str, Tensor]]:
    """The same step in one graph, auxiliary losses added to the loss."""
    net, losses = Net(num_layers), []
    for micro in micros:
        x_ND, auxes = net.embed(micro["input"]), []
        for layer in net.layers:
            x_ND, aux = layer(x_ND)
            auxes.append(aux)
        losses.append((net.head(x_ND) - micro["target"]).square().sum())
        sum(auxes, losses[-1]).backward()
    return torch.stack(losses).detach(), {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def build(layout: Layout, mesh: Mesh, num_micro: int, events: list[tuple[str, int]]) -> tuple[Stages, Pipeline]:
    stages = Stages(Net(layout.stages.num_units), layout)
    own = layout.stages_of(mesh.coordinate.pp)
    deferred = {}
    if layout.schedule is ZBV:
        for stage in own:
            deferred[stage] = DeferredWeights()
            for layer in layout.stages.part(stage):
                defer_weights(stages.net.layers[layer], deferred[stage])
    pipeline: Pipeline = Pipeline(
        own, mesh, num_micro=num_micro, rows=ROWS, hidden_size=SIZE, dtype=torch.float64,
        before_stage=lambda stage: events.append(("before", stage)),
        after_stage=lambda stage: events.append(("after", stage)),
        deferred=deferred,
    )  # fmt: skip
    return stages, pipeline


def pipeline_rank(layout: Layout, num_micro: int) -> dict[str, Any]:
    mesh = build_mesh(layout, torch.device("cpu"))
    return run_pipeline(layout, mesh, num_micro)


def run_pipeline(layout: Layout, mesh: Mesh, num_micro: int) -> dict[str, Any]:
    """train, evaluate (twice, other numbers), train again: the second gradients are what is compared."""
    events: list[tuple[str, int]] = []
    stages, pipeline = build(layout, mesh, num_micro, events)
    micros = make_micros(num_micro)
    first = pipeline.train(micros, stages.forward, stages.loss)
    after_one = list(events)
    evaluated = pipeline.evaluate(micros, stages.forward, stages.loss)
    few = pipeline.evaluate(micros[:3], stages.forward, stages.loss)
    longer = pipeline.evaluate(make_micros(2, rows=7), stages.forward, stages.loss, rows=7)
    stages.net.zero_grad(set_to_none=True)
    stages.calls.clear()
    losses = pipeline.train(micros, stages.forward, stages.loss)
    return {
        "first": first, "losses": losses, "evaluated": evaluated, "few": few, "longer": longer,
        "calls": dict(stages.calls),
        "gradients": {name: p.grad for name, p in stages.net.named_parameters() if p.grad is not None},
        "events": after_one, "events_in_all": len(events),
        "timeline": pipeline.clock.timeline(), "stages": layout.stages_of(mesh.coordinate.pp),
    }  # fmt: skip


def check(layout: Layout, num_micro: int, results: list[dict[str, Any]]) -> None:
    losses, gradients = reference(layout.stages.num_units, make_micros(num_micro))
    longer, _ = reference(layout.stages.num_units, make_micros(2, rows=7))
    last = layout.stage_owner(layout.num_stages - 1)
    found: dict[str, Tensor] = {}
    for rank, result in enumerate(results):
        for key, count in (("first", num_micro), ("losses", num_micro), ("evaluated", num_micro), ("few", 3)):
            expected = losses[:count].tolist() if rank == last else []
            assert result[key] == pytest.approx(expected, rel=1e-12), (rank, key)
        assert result["longer"] == pytest.approx(longer.tolist() if rank == last else [], rel=1e-12)
        assert not found.keys() & result["gradients"].keys()
        found |= result["gradients"]
        assert result["calls"] == dict.fromkeys(result["stages"], num_micro)
        check_events(layout, num_micro, result)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-12, msg=name)


def check_events(layout: Layout, num_micro: int, result: dict[str, Any]) -> None:
    events, actions = result["events"], result["timeline"].spans
    stages = result["stages"]
    assert sorted(events) == sorted((what, stage) for what in ("before", "after") for stage in stages)
    assert result["events_in_all"] == 2 * len(events)
    first = [stage for what, stage in events if what == "before"]
    assert first == sorted(first), "stages start in the order of the model"
    splits = layout.schedule is ZBV and layout.pp > 1
    backwards = ("I", "W") if splits else ("B",)
    expected = {(s, kind, m) for s in stages for kind in ("F", *backwards) for m in range(num_micro)}
    assert {(a.stage, a.kind, a.micro) for a in actions} == expected and len(actions) == len(expected)
    last = {stage: max(a.start_s for a in actions if a.stage == stage and a.kind == backwards[-1]) for stage in stages}
    assert [stage for what, stage in events if what == "after"] == sorted(stages, key=lambda stage: last[stage])


def layout_of(pp: int, sizes: list[int], schedule: ScheduleKind) -> Layout:
    return Layout(pp=pp, stages=Split(tuple(sizes)), schedule=schedule)


CASES = [
    (2, [3, 1], ONE, 4),
    (2, [0, 3], ONE, 2),
    (3, [2, 1, 0], ONE, 5),
    (2, [1, 2, 0, 2], INTERLEAVED, 4),
    (2, [0, 1, 2, 1, 1, 1], INTERLEAVED, 6),
    (3, [1, 1, 2, 1, 0, 1], INTERLEAVED, 8),
    (2, [1, 2, 1, 0], ZBV, 4),
    (2, [0, 2, 1, 1], ZBV, 1),
    (3, [1, 1, 2, 1, 1, 0], ZBV, 7),
]


@pytest.mark.parametrize(("pp", "sizes", "schedule", "num_micro"), CASES)
def test_equals_one_process(pp: int, sizes: list[int], schedule: ScheduleKind, num_micro: int) -> None:
    layout = layout_of(pp, sizes, schedule)
    check(layout, num_micro, run_ranks(pp, pipeline_rank, layout, num_micro))


@pytest.mark.parametrize(
    ("sizes", "schedule"), [([3], ONE), ([1, 0, 2], INTERLEAVED), ([2, 1], ZBV)], ids=["one", "interleaved", "zbv"]
)
def test_one_rank_has_no_process_group(sizes: list[int], schedule: ScheduleKind) -> None:
    layout = layout_of(1, sizes, schedule)
    check(layout, 3, [run_pipeline(layout, single_mesh(layout, torch.device("cpu")), 3)])


@pytest.mark.parametrize("case", [0, 5, 8], ids=["1f1b", "interleaved", "zbv"])
def test_ranks_work_in_the_order_of_the_plan(case: int) -> None:
    """What the clock has seen on every rank is the order that the simulator replays, and its times are causal."""
    pp, sizes, schedule, num_micro = CASES[case]
    layout = layout_of(pp, sizes, schedule)
    timelines = [result["timeline"] for result in run_ranks(pp, pipeline_rank, layout, num_micro)]
    for tasks, timeline in zip(order_of(layout, num_micro), timelines, strict=True):
        assert [(span.stage, span.kind, span.micro) for span in timeline.spans] == list(tasks)
        assert all(a.end_s <= b.start_s for a, b in zip(timeline.spans, timeline.spans[1:], strict=False))
        assert timeline.spans[-1].end_s <= timeline.span_s
        assert 0 < timeline.bubble < 1
    assert [timeline.spans[0].rank for timeline in timelines] == list(range(pp))


class FailingBackward(torch.autograd.Function):
    """The identity; its backward raises."""

    @staticmethod
    def forward(ctx, x_ND: Tensor) -> Tensor:
        return x_ND.clone()

    @staticmethod
    def backward(ctx, grad_ND: Tensor) -> Tensor:
        raise TrainingError("in backward")


def fault_rank(layout: Layout) -> list[str]:
    """What reaches the caller on rank 0 when its own code raises; each time a moment when nobody waits for it."""
    mesh, seen = build_mesh(layout, torch.device("cpu")), []
    stages, failing = Stages(Net(layout.stages.num_units), layout), ""

    def fail_at(where: str, stage: int) -> None:
        if where == failing and stage == 0:
            raise TrainingError(f"in {where}")

    def forward(stage: int, x_ND: Tensor | None, micro: dict[str, Any]) -> Tensor:
        fail_at("forward", stage)
        y_ND = stages.forward(stage, x_ND, micro)
        return FailingBackward.apply(y_ND) if failing == "backward" and stage == 0 and micro is last else y_ND

    pipeline: Pipeline = Pipeline(
        layout.stages_of(mesh.coordinate.pp), mesh, num_micro=4, rows=ROWS, hidden_size=SIZE, dtype=torch.float64,
        before_stage=partial(fail_at, "before"), after_stage=partial(fail_at, "after"),
    )  # fmt: skip
    micros = make_micros(4)
    last = micros[-1]
    for failing in ("", "after", "backward", "before", "forward"):
        if mesh.rank == 1 and failing in ("before", "forward"):
            continue  # rank 0 raises before it sends anything
        try:
            pipeline.train(micros, forward, stages.loss)
        except TrainingError as error:
            seen.append(error.what)
    return seen


@pytest.mark.parametrize(("sizes", "schedule"), [([1, 1], ONE), ([1, 1, 1, 1], INTERLEAVED)])
def test_what_the_caller_raises_comes_out_as_it_was(sizes: list[int], schedule: ScheduleKind) -> None:
    layout = layout_of(2, sizes, schedule)
    assert run_ranks(2, fault_rank, layout) == [["in after", "in backward", "in before", "in forward"], []]


def test_a_wrong_number_of_micro_batches_is_refused() -> None:
    layout = layout_of(3, [1, 1, 1], ONE)
    mesh = replace(single_mesh(layout, torch.device("cpu")), coordinate=Coordinate(1, 0, 0))
    with pytest.raises(ConfigError, match="at least 3 micro-batches"):
        Pipeline((1,), mesh, num_micro=2, rows=ROWS, hidden_size=SIZE, dtype=torch.float64)
