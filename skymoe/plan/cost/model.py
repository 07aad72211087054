"""The price list of a work: every half layer, the ends, the hop. The door of the cost model.

    prices(work)                        seconds of one micro-batch, part by part
    step_end(work, stages, ..)          what follows the last backward
    flops(shape, sequence_length, ..)   what of it was arithmetic of the model

The halves of equal layers are priced once, so a search can ask for thousands of works. The laws are in laws.py and
collectives.py, what they are applied to in attention.py, ffn.py, ends.py; docs/planner_costs.md has all of it in one
place with sources, and what is left out.
"""

from __future__ import annotations

from skymoe.plan.cost.attention import attention_bill
from skymoe.plan.cost.bill import Frame
from skymoe.plan.cost.ends import embedding_bill, head_bill, hop_s
from skymoe.plan.cost.ffn import ffn_bill
from skymoe.plan.cost.flops import ShapeFlops, flops
from skymoe.plan.cost.measured import on_measured, with_measured
from skymoe.plan.cost.prices import Price, Prices
from skymoe.plan.cost.sharding import Sharding, with_gathers
from skymoe.plan.cost.step_end import step_end
from skymoe.plan.hardware.profile import Profile
from skymoe.plan.shape import LayerShape
from skymoe.plan.work import Recompute, Work

__all__ = ["ShapeFlops", "flops", "prices", "step_end"]


def prices(work: Work, profile: Profile | None = None) -> Prices:
    """What each part of `work` costs on one rank, per micro-batch.

    Args:
        work: the work.
        profile: of the machine it is to run on. Its constants replace those of the catalogue, and where it has timed
            this very model at this number of tokens, its seconds replace the laws (see measured.py).
    """
    if profile is not None:
        work = on_measured(work, profile)
        return with_measured(work, _listed(work), profile.times)
    return _listed(work)


def _listed(work: Work) -> Prices:
    """By the laws."""
    frame = Frame(work)
    sharding = Sharding(frame)
    known: dict[LayerShape, tuple[Price, ...]] = {}
    halves: list[Price] = []
    for layer in work.shape.layers:
        if layer not in known:
            bills = (attention_bill(frame, layer.attention), ffn_bill(frame, layer.ffn))
            listed = tuple(bill.price(work.recompute) for bill in bills)
            known[layer] = with_gathers(sharding, listed, sharding.halves(layer))
        halves += known[layer]
    embedding, head = embedding_bill(frame).price(Recompute.NONE), head_bill(frame).price(Recompute.NONE)
    for_embedding, for_head = sharding.ends()
    return Prices(
        halves=tuple(halves),
        embedding=with_gathers(sharding, (embedding,), (for_embedding,))[0],
        head=with_gathers(sharding, (head,), (for_head,))[0],
        hop_s=hop_s(frame),
    )
