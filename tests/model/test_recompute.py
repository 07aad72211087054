from __future__ import annotations

import pytest
import torch
from torch import Tensor

from skymoe.model.batch import BatchInfo
from skymoe.ops.balance import AuxLoss, aux_loss, z_loss
from skymoe.ops.loss import linear_cross_entropy


def random_tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(37, (batch, length), generator=torch.Generator().manual_seed(seed))


def loss_of(model, info: BatchInfo | None = None, recompute: tuple[int, ...] = ()) -> tuple[Tensor, tuple]:
    tokens, targets = random_tokens(2, 9), random_tokens(2, 9, seed=1)
    out = model.hidden(tokens, info, recompute=recompute)
    loss, _ = linear_cross_entropy(out.hidden_BTD, model.head_weight, targets)
    valid_T = None if info is None or info.valid_BT is None else info.valid_BT.flatten()
    for routing in out.routings:
        loss = loss + 3 * aux_loss(AuxLoss.SKYWORK, routing, valid_T=valid_T) + z_loss(routing, valid_T=valid_T)
    return loss, out.routings


def gradients(model) -> dict[str, Tensor]:
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return grads


INFOS = {
    "plain": None,
    "pads": BatchInfo(valid_BT=torch.arange(18).view(2, 9) % 9 < 7),
    "capacity": BatchInfo(capacity=5),
    "documents": BatchInfo(document_ids_BT=torch.arange(18).view(2, 9) // 4),
}


@pytest.mark.parametrize("recompute", [(1,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("info", INFOS.values(), ids=INFOS.keys())
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_bit_equal(
    make, variant, recompute: tuple[int, ...], info: BatchInfo | None, autocast: bool
) -> None:
    model = make(**variant)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain, routings = loss_of(model, info)
    plain.backward()
    expected = gradients(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        again, again_routings = loss_of(model, info, recompute)
    again.backward()
    assert again.equal(plain)
    for name, grad in gradients(model).items():
        assert grad.equal(expected[name]), name
    for a, b in zip(routings, again_routings, strict=True):
        assert a.counts_E.equal(b.counts_E) and a.expert_ids_TK.equal(b.expert_ids_TK)


@pytest.mark.parametrize("capacity", [None, 4])
def test_a_router_that_changed_meanwhile_does_not_reroute(make, moe, capacity: int | None) -> None:
    """Reverse every router between forward and backward. The recomputed layers must send every token where the forward
    sent it, so the experts' gradients meet the same tokens: experts that were idle still get none."""
    model = make(moe=moe)
    seen: list[Tensor] = []
    for layer in model.layers:
        dispatcher = layer.moe.dispatcher

        def spy(x_TD, routing, dispatch=dispatcher.dispatch):
            seen.append(routing.expert_ids_TK.clone())
            return dispatch(x_TD, routing)

        dispatcher.dispatch = spy
    loss, routings = loss_of(model, BatchInfo(capacity=capacity), recompute=(0, 1, 2))
    assert len(seen) == 3
    with torch.no_grad():
        for layer in model.layers:
            layer.moe.router.weight.neg_()
    loss.backward()
    assert len(seen) == 6, "every layer ran again"
    forward, backward = seen[:3], seen[3:][::-1]
    for first, second, routing in zip(forward, backward, routings, strict=True):
        assert first.equal(second) and first.equal(routing.expert_ids_TK)


def test_counts_are_not_doubled_by_the_backward(make, moe) -> None:
    model = make(moe=moe)
    loss, routings = loss_of(model, recompute=(0, 1, 2))
    before = [r.counts_E.clone() for r in routings]
    loss.backward()
    assert all(r.counts_E.equal(c) and int(c.sum()) == 18 * moe.top_k for r, c in zip(routings, before, strict=True))


def test_micro_batches_in_flight_do_not_mix(make, moe) -> None:
    """Two forwards, then two backwards in the other order, as a pipeline does."""
    model = make(moe=moe)
    losses = []
    for seed in (0, 1):
        tokens = random_tokens(2, 6, seed)
        loss, _ = linear_cross_entropy(model.hidden(tokens).hidden_BTD, model.head_weight, tokens)
        loss.backward()
    expected = gradients(model)
    for seed in (0, 1):
        tokens = random_tokens(2, 6, seed)
        out = model.hidden(tokens, recompute=(0, 1, 2))
        losses.append(linear_cross_entropy(out.hidden_BTD, model.head_weight, tokens)[0])
    for loss in reversed(losses):
        loss.backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-5)


def test_no_gradient_no_recomputation(make, moe) -> None:
    model, tokens = make(moe=moe), random_tokens(1, 5)
    with torch.no_grad():
        assert model.hidden(tokens, recompute=(0, 1, 2)).hidden_BTD.equal(model.hidden(tokens).hidden_BTD)
