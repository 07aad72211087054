"""ZeRO-1: every rank holds whole weights and gradients of its stages, and a dp-th of the optimizer.

    backward of all micro-batches        `.grad` is a view of a flat buffer; autograd adds to it in place
    reduce(stage)                        tp: all-reduce of what is partial; dp: reduce-scatter begins, per bucket
    gradient_norm()                      waits; ends: tables of tied embeddings; world: sum of squares
    update(lr, norm)                     clip, AdamW on the own shards; all-gather of the weights begins, per bucket
    ready(stage)                         waits, before the first forward of the stage

In a pipeline the stages do not finish at once: the reduce-scatter of the last stage travels while the first ones still
compute (cool-down), and the all-gather of a later stage while the first ones compute the next step (warm-up). Sums
are never means: the loss was divided by the targets of the global batch before.

The gradient of a tied table is summed over the two ends only in `gradient_norm`, when both are through with their
passes. In `reduce` the last stage would wait for the first, which waits for gradients that the last has yet to send.

Left out: ZeRO-2 and -3 (under a pipeline they gather weights or scatter gradients for every micro-batch); buckets that
leave while their own stage still runs its last backward.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from skymoe.parallel.adamw import AdamWSettings, GroupSettings, ShardState
from skymoe.parallel.flat import Flat
from skymoe.parallel.memory import ZeroBytes
from skymoe.parallel.mesh import Mesh
from skymoe.parallel.saved import Read, pieces, restore
from skymoe.parallel.shards import SHARD_BYTES, Bucket, plan_flats
from skymoe.weights.pieces import SavedPiece
from skymoe.weights.slices import Slice


class ZeroOptimizer:
    """AdamW over the parameters of this rank's stages, its state divided over dp.

    A step: backward passes, `reduce(stage)` for each own stage as soon as its gradients are complete, `gradient_norm`,
    then `update` (the gradients are used up) or `drop_gradients`. Before the first forward of a stage: `ready(stage)`.
    Every rank makes the same calls; the order of `reduce` is the same on all ranks of a pipeline rank.

    Args:
        stages: parameters by name for each stage of this rank, with what the rank has of them (no buffers). A table of
            tied embeddings whose first and last stage are both here is one object in both mappings. Every parameter's
            values are moved into a flat buffer (`parameter.data` becomes a view), and its `.grad` is set for good.
        mesh: of this rank.
        settings: of AdamW.
        group_of: the settings of a parameter, from its name and itself.
        tied: names that the first and the last stage share: `{"embed.weight"}` with tied embeddings, else empty.
        gradients: format in which gradients are added up over micro-batches and ranks.
        overlap: leave collectives running behind `reduce` and `update`; the results are the same bits.
        shard_bytes: gradients of a rank's shard of a bucket, at most.
    """

    def __init__(
        self,
        stages: Mapping[int, Mapping[str, tuple[nn.Parameter, Slice]]],
        mesh: Mesh,
        settings: AdamWSettings,
        group_of: Callable[[str, nn.Parameter], GroupSettings],
        *,
        tied: Collection[str],
        gradients: torch.dtype = torch.float32,
        overlap: bool = True,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self._mesh, self._settings, self._overlap = mesh, settings, overlap
        self._stages = tuple(stages)
        plans = plan_flats(
            {stage: {name: slice_ for name, (_, slice_) in found.items()} for stage, found in stages.items()},
            mesh.layout,
            mesh.coordinate,
            tied=tied,
            shard_elements=shard_bytes // gradients.itemsize,
        )
        self._flats: list[tuple[Flat, ShardState]] = []
        for plan in plans:
            owned = [stages[plan.stages[0]][item.name][0] for item in plan.slices]
            for stage in plan.stages[1:]:
                same = [stages[stage][item.name][0] for item in plan.slices]
                assert all(one is other for one, other in zip(owned, same, strict=True)), "tied, but two objects"
            flat = Flat(plan, owned, gradients)
            groups = [group_of(item.name, parameter) for item, parameter in zip(plan.slices, owned, strict=True)]
            self._flats.append((flat, ShardState(flat, settings, groups)))
        self._unreduced = set(self._stages)
        self._norm: Tensor | None = None
        self._reducing: list[dist.Work] = []
        self._gathering: list[tuple[tuple[int, ...], dist.Work]] = []

    @torch.no_grad()
    def reduce(self, stage: int) -> None:
        """Sum the gradients of `stage`, complete on this rank, over tp (where partial) and dp: this starts it."""
        self._unreduced.remove(stage)
        for flat, _ in self._flats:
            if stage not in flat.plan.stages or not self._unreduced.isdisjoint(flat.plan.stages):
                continue  # a tied table waits for its second stage
            assert flat.gradients_are_here()
            flat.sum_partial(self._mesh.tp)
            for bucket in flat.plan.buckets:
                self._reducing += flat.reduce(bucket, self._mesh.dp)
        if not self._overlap:
            self._wait_for_gradients()

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """Euclidean norm over all gradients of the model, fp64, the same bits on every rank.

        Reduces the stages for which `reduce` was not called, and waits for all. A collective act of the world.
        """
        if self._norm is None:
            for stage in self._stages:
                if stage in self._unreduced:
                    self.reduce(stage)
            self._wait_for_gradients()
            self._sum_over_ends()
            self._norm = self._squares().sqrt()
        return self._norm

    @torch.no_grad()
    def update(self, lr: float, grad_norm: float) -> None:
        """Clip by the norm already known, take one step at the rate `lr`, and start the all-gather of the weights.

        The gradients are used up.
        """
        assert self._norm is not None, "gradient_norm comes first"
        self.settle()
        clip = self._settings.clip
        scale = clip / grad_norm if 0 < clip < grad_norm else None
        for flat, state in self._flats:
            for number, bucket in enumerate(flat.plan.buckets):
                state.update(number, lr, scale)
                self._gather(flat, bucket)
        if not self._overlap:
            self.settle()
        self.drop_gradients()

    def ready(self, stage: int) -> None:
        """Wait until the weights of `stage` are whole."""
        for stages, work in self._gathering:
            if stage in stages:
                work.wait()
        self._gathering = [(stages, work) for stages, work in self._gathering if stage not in stages]

    def settle(self) -> None:
        """Wait until all weights are whole."""
        for stage in self._stages:
            self.ready(stage)

    @torch.no_grad()
    def drop_gradients(self) -> None:
        """Zero the gradients: of a step that is not taken, or of one that was."""
        self._wait_for_gradients()
        for flat, _ in self._flats:
            flat.gradients.zero_()
        self._unreduced, self._norm = set(self._stages), None

    def pieces(self) -> Iterator[SavedPiece]:
        """What this rank saves; over all ranks every element of every tensor once. No communication."""
        for flat, state in self._flats:
            yield from pieces(flat, state)

    @torch.no_grad()
    def restore(self, read: Read) -> None:
        """The inverse of `pieces`, from any layout. A collective act: the weights are gathered over dp.

        Args:
            read: the values of a box of a tensor, by stem and name; None where the checkpoint has no such tensor.
                Without moments a parameter starts fresh, without master copy from the weights.

        Raises:
            CheckpointError: weights are missing, or values have another shape or format than asked for.
        """
        self.settle()
        for flat, state in self._flats:
            restore(flat, state, read)
        for flat, _ in self._flats:
            for bucket in flat.plan.buckets:
                self._gather(flat, bucket)
        self.settle()

    def allocated(self) -> ZeroBytes:
        """Bytes of the buffers: what `memory.zero_bytes` says without them."""
        states = [state for _, state in self._flats]
        return ZeroBytes(
            weights=sum(flat.weights.nbytes for flat, _ in self._flats),
            gradients=sum(flat.gradients.nbytes for flat, _ in self._flats),
            optimizer=sum(part.nbytes for state in states for part in (state.exp_avg, state.exp_avg_sq, state.steps)),
            master=sum(state.master.nbytes for state in states if state.master is not None),
        )

    def _gather(self, flat: Flat, bucket: Bucket) -> None:
        self._gathering += [(flat.plan.stages, work) for work in flat.gather(bucket, self._mesh.dp)]

    def _wait_for_gradients(self) -> None:
        for work in self._reducing:
            work.wait()
        self._reducing.clear()

    def _sum_over_ends(self) -> None:
        """Both copies of a tied table get the sum of both gradients, each rank for its shards."""
        for flat, _ in self._flats:
            if flat.plan.shared_by_ends and self._mesh.ends.handle is not None:
                for bucket in flat.plan.buckets:
                    dist.all_reduce(flat.gradients[bucket.own], group=self._mesh.ends.handle)

    def _squares(self) -> Tensor:
        """Of all gradients of the model, fp64; gathered and added in the order of the ranks: the same bits on each."""
        squares = torch.zeros((), dtype=torch.float64, device=self._mesh.device)
        for _, state in self._flats:
            squares += state.squares()
        world = self._mesh.world
        if world.handle is None:
            return squares
        found = [torch.empty_like(squares) for _ in range(world.size)]
        dist.all_gather(found, squares, group=world.handle)
        return torch.stack(found).sum()
