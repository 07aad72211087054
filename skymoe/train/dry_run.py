"""`skymoe train --dry-run --world-size N`: one rank of a run on N ranks, built in this process without its machines.

The groups are made in a world of torch's fake backend, the modules, ZeRO's weights, gradients and optimizer shards are
those of a real run on the meta device: tensors without memory. What cannot be divided is refused here as there. The
data is not opened. Not counted: activations, buffers of communication, and what kernels need while they run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from skymoe.parallel.adamw import AdamWSettings, GroupSettings
from skymoe.parallel.config import layout_of
from skymoe.parallel.fake import fake_world
from skymoe.parallel.mesh import Mesh, build_mesh, single_mesh
from skymoe.parallel.options import PartOptions
from skymoe.parallel.spread import build_parts
from skymoe.parallel.zero import ZeroOptimizer
from skymoe.plan.orders import check_micro_batches
from skymoe.spec.flops import flops_per_token
from skymoe.spec.layout import Coordinate, ExpertAxis, Half, Layout, ScheduleKind
from skymoe.spec.model import ModelSpec
from skymoe.spec.timeline import layout_fields
from skymoe.train.build import resolve_spec
from skymoe.train.config import TrainConfig
from skymoe.train.dry_run_result import DryRunReport, GroupFigures, RankFigures, StageFigures
from skymoe.train.planned_batch import warn_of_other_batch
from skymoe.train.ranks import micro_batches
from skymoe.weights.buffers import torch_dtype
from skymoe.weights.slices import Slice, owned_slices, volume


def dry_run(config: TrainConfig, *, world_size: int, rank: int = 0) -> DryRunReport:
    """Build `rank` of a run of `config` on `world_size` ranks, and say what it is.

    Raises:
        ConfigError: model, batch or ranks cannot be divided as the recipe says, or there is no such rank.
        FormatError: `model.path` or `parallel.plan` cannot be read.
    """
    spec = resolve_spec(config)
    layout = layout_of(config.parallel, spec, world_size=world_size, recompute=config.recompute)
    coordinate = layout.coordinate(rank)
    micro_sequences, num_micro = _micro_batches(config, layout)
    warn_of_other_batch(config, layout)
    if world_size == 1:
        figures = _rank_figures(config, spec, single_mesh(layout, torch.device("meta")), micro_sequences)
    else:
        with fake_world(world_size, rank):
            mesh = build_mesh(layout, torch.device("meta"))
            assert mesh.coordinate == coordinate
            figures = _rank_figures(config, spec, mesh, micro_sequences)
    counts = list(_owned_and_counted(spec, layout))
    return DryRunReport(
        world_size=world_size,
        layout=layout_fields(layout),
        weights=str(config.precision.weights),
        gradients=config.parallel.gradients,
        sequences=config.batch.sequences,
        sequence_length=config.data.sequence_length,
        micro_sequences=micro_sequences,
        num_micro=num_micro,
        bubble=bubble(layout, num_micro),
        parameters=sum(counted for _, counted in counts),
        mean_parameters=sum(owned for owned, _ in counts) / len(counts),
        most_parameters=max(owned for owned, _ in counts),
        rank=figures,
        stages=_stage_table(spec, layout, config.data.sequence_length),
    )


def bubble(layout: Layout, num_micro: int) -> float | None:
    """The idle share of a pipeline of P ranks whose stages take the same time, with m micro-batches.

    (P - 1) / (m + P - 1) under 1f1b, (P - 1) / (v m + P - 1) with v stages per rank (Narayanan et al. 2021); under zbv
    it depends on the times of the two halves of the backward pass: None.
    """
    if layout.schedule is ScheduleKind.ZERO_BUBBLE and layout.pp > 1:
        return None
    return (layout.pp - 1) / (layout.num_stages // layout.pp * num_micro + layout.pp - 1)


def _micro_batches(config: TrainConfig, layout: Layout) -> tuple[int, int]:
    """Sequences of a micro-batch, and how many a replica has in a step."""
    num_micro = micro_batches(config.batch, layout)
    check_micro_batches(layout, num_micro)
    return config.batch.sequences // (layout.dp * num_micro), num_micro


def _rank_figures(config: TrainConfig, spec: ModelSpec, mesh: Mesh, micro_sequences: int) -> RankFigures:
    """Modules and optimizer of one rank, on meta tensors."""
    layout, parallel = mesh.layout, config.parallel
    options = PartOptions(
        num_tokens=micro_sequences * config.data.sequence_length,
        overlap=parallel.overlap,
        chunks=parallel.dispatch_chunks,
    )
    parts = build_parts(spec, mesh, options, dtype=torch_dtype(config.precision.weights))
    parameters = {stage: dict(part.named_parameters()) for stage, part in parts.items()}
    zero = ZeroOptimizer(
        {stage: {name: (own[name], parts[stage].slices[name]) for name in own} for stage, own in parameters.items()},
        mesh,
        AdamWSettings(),
        lambda name, parameter: GroupSettings(),
        tied={"embed.weight"} if spec.tie_embeddings else (),
        gradients=torch.float32 if parallel.gradients == "float32" else torch.bfloat16,
        overlap=parallel.overlap,
    )
    held = zero.allocated()
    distinct = {parameter for own in parameters.values() for parameter in own.values()}
    return RankFigures(
        rank=mesh.rank,
        **mesh.coordinate._asdict(),
        stages=layout.stages_of(mesh.coordinate.pp),
        parameters=sum(parameter.numel() for parameter in distinct),
        weights=held.weights,
        gradients=held.gradients,
        moments=held.optimizer,
        master=held.master,
        groups=_groups(mesh),
    )


def _groups(mesh: Mesh) -> tuple[GroupFigures, ...]:
    expert = f"expert ({mesh.layout.expert})"
    named = {"pp": mesh.pp, "dp": mesh.dp, "tp": mesh.tp, expert: mesh.expert, "ends": mesh.ends}
    return tuple(GroupFigures(kind, group.ranks) for kind, group in named.items())


def _owned_and_counted(spec: ModelSpec, layout: Layout) -> Iterator[tuple[int, int]]:
    """For every coordinate: the parameters it has, and those of them that no coordinate before it has had.

    Where no rank of another dp has other parameters (edp), dp 0 stands for all.
    """
    for pp in range(layout.pp):
        for dp in range(1 if layout.expert is ExpertAxis.EDP else layout.dp):
            for tp in range(layout.tp):
                place = Coordinate(pp, dp, tp)
                owned = [
                    (item, _is_copy(item, spec, stage))
                    for stage in layout.stages_of(pp)
                    for item in owned_slices(spec, layout, place, stage).values()
                    if not item.is_buffer
                ]
                here = [item for item, is_copy in owned if not (is_copy and 0 in layout.stages_of(pp))]
                first = [item for item, is_copy in owned if not is_copy and _is_first(item, place)]
                yield _elements(here), _elements(first)


def _is_copy(item: Slice, spec: ModelSpec, stage: int) -> bool:
    """Whether this is the last stage's own copy of a tied table."""
    return spec.tie_embeddings and item.name == "embed.weight" and stage > 0


def _is_first(item: Slice, place: Coordinate) -> bool:
    return (place.tp == 0 or not item.replicated) and (place.dp == 0 or not item.reduced)


def _elements(slices: Sequence[Slice]) -> int:
    return sum(item.num_elements for item in slices)


def _stage_table(spec: ModelSpec, layout: Layout, sequence_length: int) -> tuple[StageFigures, ...]:
    flops = flops_per_token(spec, sequence_length)
    rows = []
    for stage in range(layout.num_stages):
        halves, is_last = layout.halves(stage), stage == layout.num_stages - 1
        owner = layout.stage_owner(stage)
        slices = owned_slices(spec, layout, Coordinate(owner, 0, 0), stage).values()
        own = sum((flops.attention if half.is_attention else flops.ffn)[half.layer] for half in halves)
        rows.append(
            StageFigures(
                stage=stage,
                owner=owner,
                layers=len(halves) / 2,
                holds=_in_words(halves, is_first=stage == 0, is_last=is_last),
                recompute=layout.recompute[stage],
                parameters=sum(
                    volume(tuple((0, size) for size in item.whole_shape)) for item in slices if not item.is_buffer
                ),
                flops_share=(own + (flops.head if is_last else 0.0)) / flops.total,
            )
        )
    return tuple(rows)


def _in_words(halves: Sequence[Half], *, is_first: bool, is_last: bool) -> str:
    """For example `embedding, 0-3, attention of 4`."""
    words = ["embedding"] if is_first else []
    whole = sorted({half.layer for half in halves})
    tail = []
    if halves and not halves[0].is_attention:
        words.append(f"feed-forward of {whole.pop(0)}")
    if whole and halves[-1].is_attention:
        tail.append(f"attention of {whole.pop()}")
    if whole:
        words.append(f"{whole[0]}-{whole[-1]}" if len(whole) > 1 else str(whole[0]))
    return ", ".join([*words, *tail, *(["norm, head"] if is_last else [])])
