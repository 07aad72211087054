"""How many bytes a rank sends to bring tokens to their experts and back: one MoE layer, one pass, one micro-batch.

With n tensor-parallel ranks, D replicas, t tokens per replica, k choices, and everything dividing everything, the
bytes per rank in units of one token's hidden state are

    R  edp        2 (n-1)/n t                                    a ring all-reduce
       ep, etp    2 (D-1) t + 2 (n-1)/n t
    G  edp        2 (n-1)/n t                                    all-gather and reduce-scatter
       ep, etp    2 (m-1)/m D t                  m = D n
    A  edp        2 k (n-1)/n^2 t                                = k/n of G
       ep         2 k (m-1)/m t/n
       etp        2 k (D-1)/D t/n  +  2 k (n-1)/n t

The function below is their generalization to parts of any size, in whole rows: an all-gather sends a rank's rows to
each other rank, a reduce-scatter sends every other rank its part, an all-to-all the rows that others own. It is what
parallel/transport.py sends (a test holds them together, to the byte). The backward pass sends the same; recomputation
in between sends the forward's again. Metadata (expert ids, router weights, counts: some 8 k bytes per token) is apart.

In mode A the rows depend on the data; without `loads` every expert is taken to be chosen equally often.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from skymoe.spec.layout import Coordinate, DispatchMode, ExpertAxis, Layout
from skymoe.spec.split import Split

Loads = Sequence[Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class DispatchShape:
    """What the bytes depend on beside the layout.

    Attributes:
        num_tokens: t, of a replica in a micro-batch.
        hidden_size: numbers per token.
        itemsize: bytes per number.
        num_experts, top_k: of the layer.
    """

    num_tokens: int
    hidden_size: int
    itemsize: int
    num_experts: int
    top_k: int


def dispatch_bytes(layout: Layout, place: Coordinate, shape: DispatchShape, loads: Loads | None = None) -> float:
    """Bytes that the rank at `place` sends in one pass of dispatch and combine.

    Args:
        layout: with its expert axis and mode.
        place: the rank's coordinate.
        shape: of the layer and its tokens.
        loads: loads[dp * tp_size + tp][e] assignments to expert e by the tokens of that rank of the same stage; read in
            mode A. None: equally many to each expert.
    """
    row = shape.hidden_size * shape.itemsize
    tokens = layout.tokens(shape.num_tokens)
    spans_replicas = layout.expert is not ExpertAxis.EDP
    if layout.dispatch is DispatchMode.REPLICATED:
        replicas = Split((shape.num_tokens,) * (layout.dp if spans_replicas else 1))
        numbers = Split.remainder_first(shape.num_tokens * shape.hidden_size, layout.tp)
        there_and_back = _gather_and_reduce(replicas.sizes, place.dp if spans_replicas else 0)
        return there_and_back * row + _gather_and_reduce(numbers.sizes, place.tp) * shape.itemsize
    if layout.dispatch is DispatchMode.GATHERED:
        if spans_replicas:
            return _gather_and_reduce(tokens.sizes * layout.dp, place.dp * layout.tp + place.tp) * row
        return _gather_and_reduce(tokens.sizes, place.tp) * row
    return _all_to_all_rows(layout, place, shape, loads or _equal_loads(layout, shape)) * row


def _gather_and_reduce(sizes: Sequence[float], rank: int) -> float:
    """Units sent by `rank` in an all-gather of parts of these sizes and a reduce-scatter to them."""
    return (len(sizes) - 1) * sizes[rank] + sum(sizes) - sizes[rank]


def _equal_loads(layout: Layout, shape: DispatchShape) -> Loads:
    sizes = layout.tokens(shape.num_tokens).sizes * layout.dp
    return [[size * shape.top_k / shape.num_experts] * shape.num_experts for size in sizes]


def _all_to_all_rows(layout: Layout, place: Coordinate, shape: DispatchShape, loads: Loads) -> float:
    """Rows sent to other ranks' experts, and back to the tokens of other ranks; under etp, within tp as well."""
    local = layout.experts(shape.num_experts).part(layout.expert_rank(place))

    def came(to: Sequence[int]) -> list[float]:
        return [sum(loads[source][expert] for expert in local) for source in to]

    own = place.dp * layout.tp + place.tp
    peers = {  # ranks of the all-to-all, as rows of `loads`
        ExpertAxis.EDP: range(place.dp * layout.tp, (place.dp + 1) * layout.tp),
        ExpertAxis.EP: range(layout.dp * layout.tp),
        ExpertAxis.ETP: range(place.tp, layout.dp * layout.tp, layout.tp),
    }[layout.expert]
    stays = came([own])[0]
    rows = (sum(loads[own]) - stays) + (sum(came(peers)) - stays)
    if layout.expert is ExpertAxis.ETP:
        shared = [sum(came(range(tp, layout.dp * layout.tp, layout.tp))) for tp in range(layout.tp)]
        rows += _gather_and_reduce(shared, place.tp)
    return rows
