"""The flat buffers themselves: whole weights and gradients of a `FlatPlan`, with the parameters as views into them.

Autograd adds to a `.grad` that is there in place, and `Tensor.grad_dtype` lets it be of another format than the weight
(bf16 weights whose gradients of many micro-batches are added up in fp32). So nothing is copied between a backward
pass and the collective that sums it over ranks.

Everything travels in place, without a second buffer. On gloo a bucket is one reduction to, and one broadcast from, the
owner of each shard: its own reduce-scatter is an all-reduce with a copy behind it, its all-gather copies too
(docs/zero.md has the times). Elsewhere reduce-scatter and all-gather, in place: a shard lies where it belongs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from skymoe.parallel.mesh import Group
from skymoe.parallel.shards import Bucket, FlatPlan

try:
    from torch.distributed import all_gather_single, reduce_scatter_single
except ImportError:  # their names before torch 2.13
    from torch.distributed import all_gather_into_tensor as all_gather_single
    from torch.distributed import reduce_scatter_tensor as reduce_scatter_single


class Flat:
    """Weights and gradients of one flat.

    Args:
        plan: where everything lies.
        parameters: in the order of the plan's slices; from now on views of `weights`, their `.grad` views of
            `gradients`.
        gradients: format of the gradients.
    """

    def __init__(self, plan: FlatPlan, parameters: Sequence[nn.Parameter], gradients: torch.dtype) -> None:
        first = parameters[0]
        self.plan = plan
        self.parameters = tuple(parameters)
        self.weights = torch.zeros(plan.size, dtype=first.dtype, device=first.device)
        self.gradients = torch.zeros(plan.size, dtype=gradients, device=first.device)
        self._grads: list[Tensor] = []
        for parameter, item, offset in zip(parameters, plan.slices, plan.offsets, strict=True):
            assert parameter.shape == item.shape and parameter.dtype == first.dtype, item.name
            part = slice(offset, offset + item.num_elements)
            view = self.weights[part].view(item.shape)
            view.copy_(parameter.detach())
            parameter.data = view
            parameter.grad_dtype = gradients
            parameter.grad = self.gradients[part].view(item.shape)
            self._grads.append(parameter.grad)

    def sum_partial(self, tp: Group) -> None:
        """Sum what is partial over tp."""
        if tp.handle is not None and self.plan.num_partial:
            dist.all_reduce(self.gradients[: self.plan.num_partial], group=tp.handle)

    def reduce(self, bucket: Bucket, dp: Group) -> list[dist.Work]:
        """Start the sum of a bucket over dp; only `bucket.own` of the gradients is defined afterwards."""
        if dp.handle is None or self.plan.num_shards == 1:
            return []
        whole = self.gradients[bucket.start : bucket.stop]
        if dist.get_backend(dp.handle) == "gloo":
            shards = zip(whole.chunk(dp.size), dp.ranks, strict=True)
            return [dist.reduce(shard, owner, group=dp.handle, async_op=True) for shard, owner in shards]
        return [reduce_scatter_single(self.gradients[bucket.own], whole, group=dp.handle, async_op=True)]

    def gather(self, bucket: Bucket, dp: Group) -> list[dist.Work]:
        """Start to collect a bucket of weights from the ranks that updated its shards."""
        if dp.handle is None or self.plan.num_shards == 1:
            return []
        whole = self.weights[bucket.start : bucket.stop]
        if dist.get_backend(dp.handle) == "gloo":
            shards = zip(whole.chunk(dp.size), dp.ranks, strict=True)
            return [dist.broadcast(shard, owner, group=dp.handle, async_op=True) for shard, owner in shards]
        return [all_gather_single(whole, self.weights[bucket.own], group=dp.handle, async_op=True)]

    def gradients_are_here(self) -> bool:
        """Whether every `.grad` is still the view it was; somebody who sets it to None or anew loses gradients."""
        return all(parameter.grad is grad for parameter, grad in zip(self.parameters, self._grads, strict=True))
