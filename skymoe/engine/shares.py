"""What one rank has of each layer, as ranges of the whole model's units. No torch.

The feed-forwards that a serving plan does not name (dense layers of a mixture, shared experts) are divided in the
proportions of the one that it does.
"""

from __future__ import annotations

from dataclasses import dataclass

from skymoe.spec.model import ModelSpec
from skymoe.spec.serving_plan import ServingPlan
from skymoe.spec.split import Split


@dataclass(frozen=True)
class LayerShare:
    """Ranges of the whole model's units; each may be empty.

    Attributes:
        heads: query heads.
        kv_heads: key/value heads that they read. Ranks may have one in common.
        columns: of the dense feed-forward, or of each expert here.
        experts: experts here; empty in dense layers.
        shared: columns of the shared expert.
        holds_first: whether no lower rank has these key/value heads; they count once in what is summed over ranks.
    """

    heads: range
    kv_heads: range
    columns: range
    experts: range
    shared: range
    holds_first: bool


def layer_share(spec: ModelSpec, plan: ServingPlan, layer: int, rank: int) -> LayerShare:
    """The share of `rank` in `layer`."""
    group = spec.num_heads // spec.num_kv_heads
    heads = plan.heads(layer).part(rank)
    kv_heads = range(heads.start // group, -(-heads.stop // group)) if heads else range(0)
    experts, shared = range(0), range(0)
    if spec.moe is not None and spec.is_moe_layer(layer):
        whole = range(spec.moe.num_experts)
        experts = plan.experts(layer).part(rank) if plan.whole_experts else whole
        columns = range(spec.moe.ffn_size) if plan.whole_experts else plan.columns(layer).part(rank)
        shared = _alike(spec.moe.shared_ffn_size, plan, layer).part(rank)
    elif spec.moe is None or not spec.moe_layer_ids:
        columns = plan.columns(layer).part(rank)
    else:
        columns = _alike(spec.ffn_size, plan, layer).part(rank)
    return LayerShare(heads, kv_heads, columns, experts, shared, heads.start % group == 0)


def vocabulary_rows(plan: ServingPlan) -> Split:
    """Rows of embedding and head per rank."""
    return Split(plan.split.vocabulary)


def kv_heads_per_layer(spec: ModelSpec, plan: ServingPlan, rank: int) -> tuple[int, ...]:
    """Key/value heads that `rank` keeps, by layer."""
    return tuple(len(layer_share(spec, plan, layer, rank).kv_heads) for layer in range(spec.num_layers))


def _alike(width: int, plan: ServingPlan, layer: int) -> Split:
    """`width` columns in the proportions of the main feed-forward; between its blocks where there are enough."""
    sizes = (plan.experts(layer) if plan.whole_experts else plan.columns(layer)).sizes
    block = plan.block if width % plan.block == 0 else 1
    return Split.weighted(width // block, sizes).scaled(block)
