"""When is the upcycled model its parent at step 0? The table of docs/upcycling.md as code. No torch.

Of a dense layer y = F(x) the mixture computes y = sum over the chosen experts of w_i E_i(x) (plus a shared expert).
Each row says in one sentence why that is F(x) or why not, in real arithmetic; the first row that applies answers, and
the receipt holds the answer against the files. "Not exact" does not mean bad: specialists are meant to differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from skymoe.convert.exactness import Exactness
from skymoe.upcycle.blueprint import Blueprint
from skymoe.upcycle.config import Method, Rest, Shared


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: short, for tests and the documentation.
        applies: to this blueprint, when no row above it did.
        exact: the promise.
        reason: why, in words.
    """

    name: str
    applies: Callable[[Blueprint], bool]
    exact: bool
    reason: str


def promise(blueprint: Blueprint) -> Exactness:
    """What the method promises in real arithmetic."""
    row = find_row(blueprint)
    return Exactness(row.exact, row.reason)


def find_row(blueprint: Blueprint) -> Row:
    """The first row of the table that applies."""
    return next(row for row in ROWS if row.applies(blueprint))


def _is(*methods: Method) -> Callable[[Blueprint], bool]:
    return lambda blueprint: blueprint.method in methods


def _all_chosen(blueprint: Blueprint) -> bool:
    return blueprint.moe.top_k == blueprint.moe.num_experts


def _cloned_whole(blueprint: Blueprint) -> bool:
    return blueprint.method is Method.DUPLICATE and blueprint.clones == int(blueprint.clones)


def _chosen_as_often(blueprint: Blueprint) -> bool:
    return blueprint.moe.top_k == blueprint.clones * blueprint.parent_top_k


# fmt: off
ROWS: tuple[Row, ...] = (
    Row("averaged rest",
        lambda b: b.method is Method.SPECIALISTS and b.rest is Rest.AVERAGE, False,
        "everything outside the experts is the mean over the sources, which is none of them"),
    Row("zero routed",
        lambda b: b.shared is Shared.ZERO_ROUTED, True,
        "the shared expert is the dense feed-forward (its gate is 1/2, its down projection twice as large), and the "
        "routed experts add zero, whatever the router chooses"),
    Row("drop", _is(Method.DROP), False,
        "a share of each expert's neurons was drawn anew, so no expert is the dense feed-forward"),
    Row("noise", _is(Method.NOISE), False,
        "a share of each expert's neurons carries noise, so no expert is the dense feed-forward"),
    Row("specialists",
        lambda b: b.method is Method.SPECIALISTS and set(b.assign) != {0}, False,
        "the experts come from different models, so their mixture is none of them"),
    Row("partition", _is(Method.PARTITION), False,
        "each expert has a part of the neurons, and a token gets the chosen parts only, weighted unequally"),
    Row("clones, router noise",
        lambda b: b.method is Method.DUPLICATE and b.router_noise > 0, False,
        "the router rows of the copies carry noise, so that an expert's clones are not chosen like the expert"),
    Row("clones, as many times top-k",
        lambda b: _cloned_whole(b) and _chosen_as_often(b), True,
        "an expert and its clones are chosen together and divide its weight among them"),
    Row("clones, top-k kept", _is(Method.DUPLICATE), False,
        "clones of one expert take places among the top_k that other experts had"),
    Row("virtual groups, he2024",
        lambda b: b.gate_up_scale != 1.0, False,
        "the gate projection is scaled, and silu(s x) is not s silu(x): the output keeps its size only on average"),
    Row("virtual groups, other scale",
        lambda b: b.down_scale != b.shards, False,
        "the routed experts' output is scaled by another factor than the number of shards that make it up"),
    Row("virtual groups, all experts, not renormalized",
        lambda b: b.method is Method.VIRTUAL_GROUP and _all_chosen(b), True,
        "all experts are used and the softmax sums to 1: every shard gets its full share"),
    Row("virtual groups, top-k cuts a group",
        lambda b: b.method is Method.VIRTUAL_GROUP and b.moe.top_k % b.shards != 0, False,
        "top_k is no multiple of the number of shards: of one group a token gets some shards and misses others"),
    Row("virtual groups, not renormalized",
        lambda b: b.method is Method.VIRTUAL_GROUP and not b.moe.norm_topk, False,
        "the chosen probabilities are not renormalized: a token's output is scaled by their sum, which is below 1"),
    Row("virtual groups", _is(Method.VIRTUAL_GROUP), True,
        "the experts of a group share one router row and are chosen together, the combine weights sum to 1, and the "
        "scale of the down projection makes up for the division among the shards"),
    Row("copy, renormalized",
        lambda b: b.moe.norm_topk, True,
        "every expert is the dense feed-forward, and the combine weights sum to 1, whatever the router chooses"),
    Row("copy, all experts",
        _all_chosen, True,
        "every expert is the dense feed-forward, and all are used: the softmax sums to 1"),
    Row("copy, not renormalized",
        lambda b: True, False,
        "the chosen probabilities are not renormalized: a token's output is scaled by their sum, which is below 1"),
)
# fmt: on
