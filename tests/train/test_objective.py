"""The gradient of a step does not depend on how the step is cut into micro-batches, and counts are counted once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from train.tiny import MOE, VOCAB

from skymoe.model.batch import BatchInfo
from skymoe.model.init import initialize
from skymoe.model.transformer import Transformer
from skymoe.ops.balance import AuxLoss, capacity, drop_rate, real_drop_rate
from skymoe.ops.loss import IGNORED
from skymoe.train.batches import MicroBatch, StepBatch
from skymoe.train.model_config import SpecConfig
from skymoe.train.objective import Objective, accumulate_gradients, balance_value, forward

SEQUENCES, LENGTH, ALPHA_L = 7, 11, [0.3, 0.7]  # large coefficients: a wrong balance gradient must show


def make_model(dtype=torch.float64, **moe) -> Transformer:
    spec = SpecConfig.model_validate({**MOE, "moe": {**MOE["moe"], **moe}}, strict=False).to_spec()
    model = initialize(Transformer(spec), seed=3)
    with torch.no_grad():
        for layer in model.layers:
            layer.moe.router.weight.mul_(20)  # gates that differ between tokens
    return model.to(dtype)


def make_batch(micro_sequences: int, *, seed: int = 0) -> StepBatch:
    """Random tokens; pads at the end of some rows (one row is nothing but pads) and ignored targets."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(0, VOCAB, (SEQUENCES, LENGTH), generator=generator)
    targets_BT = torch.randint(0, VOCAB, (SEQUENCES, LENGTH), generator=generator)
    valid_BT = torch.arange(LENGTH) < torch.tensor([11, 4, 11, 0, 9, 11, 1])[:, None]
    targets_BT[~valid_BT] = IGNORED
    targets_BT[2, 3:6] = IGNORED
    micros = tuple(
        MicroBatch(
            tokens_BT[rows], targets_BT[rows], BatchInfo(valid_BT=valid_BT[rows]), num_tokens=int(valid_BT[rows].sum())
        )
        for rows in (slice(start, start + micro_sequences) for start in range(0, SEQUENCES, micro_sequences))
    )
    return StepBatch(micros, int((targets_BT != IGNORED).sum()), int(valid_BT.sum()), SEQUENCES)


def gradients(model: Transformer, batch: StepBatch, objective: Objective):
    model.zero_grad()
    sums = accumulate_gradients(model, batch, objective, ALPHA_L)
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}, sums


def assert_close(left, right, tolerance):
    for name, grad in left.items():
        torch.testing.assert_close(
            grad, right[name], rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 2e-5)])
@pytest.mark.parametrize("aux", [AuxLoss.SKYWORK, AuxLoss.SWITCH])
@pytest.mark.parametrize("micro_sequences", [1, 2, 4])
def test_micro_batches_do_not_change_the_gradient(aux, micro_sequences, dtype, tolerance):
    model = make_model(dtype)
    objective = Objective(aux=aux)
    whole, whole_sums = gradients(model, make_batch(SEQUENCES), objective)
    parts, parts_sums = gradients(model, make_batch(micro_sequences), objective)
    assert_close(parts, whole, tolerance)
    assert float(parts_sums.loss) == pytest.approx(float(whole_sums.loss), rel=1e-5)
    for a, b in zip(parts_sums.totals_L, whole_sums.totals_L, strict=True):
        assert torch.equal(a.counts_E, b.counts_E)


def test_z_loss_is_cut_exactly_too():
    model = make_model(gate_norm=False)
    objective = Objective(aux=AuxLoss.NONE, z_coefficient=0.5)
    whole, whole_sums = gradients(model, make_batch(SEQUENCES), objective)
    parts, parts_sums = gradients(model, make_batch(2), objective)
    assert_close(parts, whole, 1e-6)
    assert float(whole_sums.z) == pytest.approx(float(parts_sums.z))
    assert float(whole_sums.z) > 0


def test_the_gradient_is_that_of_equation_5_written_out():
    model, batch = make_model(), make_batch(SEQUENCES)
    (micro,) = batch.micros
    ours, sums = gradients(model, batch, Objective(aux=AuxLoss.SKYWORK))
    model.zero_grad()
    out = model.hidden(micro.tokens_BT, micro.info)
    logits = model.logits(out.hidden_BTD).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, micro.targets_BT.flatten(), ignore_index=IGNORED)
    aux = 0.0
    for alpha, routing in zip(ALPHA_L, out.routings, strict=True):
        mean_E = routing.probs_TE[micro.valid_T].mean(0)
        aux = aux + alpha * (1 / 5 - mean_E).square().sum()
    (loss + aux).backward()
    assert_close(ours, {name: p.grad for name, p in model.named_parameters()}, 1e-6)
    assert float(sums.loss) / batch.num_targets == pytest.approx(loss.item())
    assert balance_value(Objective(aux=AuxLoss.SKYWORK), ALPHA_L, sums.totals_L, 2) == pytest.approx(aux.item())


def test_micro_scope_is_another_loss():
    model = make_model()
    whole, _ = gradients(model, make_batch(2), Objective(aux=AuxLoss.SKYWORK))
    micro, _ = gradients(model, make_batch(2), Objective(aux=AuxLoss.SKYWORK, global_statistics=False))
    router = "layers.0.moe.router.weight"
    assert not torch.allclose(whole[router], micro[router], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("recompute", [range(1), range(2)])
def test_recomputed_layers_change_neither_gradients_nor_counts(recompute):
    model, objective = make_model(torch.float32), Objective(aux=AuxLoss.SKYWORK)
    plain, plain_sums = gradients(model, make_batch(2), objective)
    again, again_sums = gradients(model, make_batch(2), replace(objective, recompute=recompute))
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    for a, b in zip(plain_sums.totals_L, again_sums.totals_L, strict=True):
        assert torch.equal(a.counts_E, b.counts_E)
        assert int(a.counts_E.sum()) == 2 * make_batch(2).num_tokens


def test_real_capacity_drops_and_the_drop_rate_still_speaks_of_the_demand():
    model, batch = make_model(torch.float32), make_batch(SEQUENCES)
    _, full = gradients(model, batch, Objective(aux=AuxLoss.SKYWORK))
    _, dropped = gradients(model, batch, Objective(aux=AuxLoss.SKYWORK, real_capacity=1.0))
    limit = capacity(batch.num_tokens, num_experts=5, top_k=2, capacity_factor=1.0)
    first, sent = dropped.totals_L[0].counts_E, dropped.routings[0].sent_counts_E
    assert torch.equal(first, full.totals_L[0].counts_E)
    assert int(first.max()) > limit >= int(sent.max())
    d = drop_rate(first, num_tokens=batch.num_tokens, top_k=2, capacity_factor=1.0)
    assert d > 0
    assert d == pytest.approx(float((first - sent).sum()) / (2 * batch.num_tokens))


def test_real_capacity_holds_per_micro_batch_and_all_that_is_dropped_is_counted():
    """Loads that even out over the step do not bring back what a micro-batch has dropped."""
    model, batch = make_model(torch.float32), make_batch(2)
    objective = Objective(aux=AuxLoss.SKYWORK, real_capacity=1.0)
    _, sums = gradients(model, batch, objective)
    routings = [forward(model, micro, objective).routings[0] for micro in batch.micros]
    lost = sum(int((routing.counts_E - routing.sent_counts_E).sum()) for routing in routings)
    rate = real_drop_rate(sums.totals_L[0], top_k=2)
    assert rate == pytest.approx(lost / (2 * batch.num_tokens))
    of_the_sum = drop_rate(sums.totals_L[0].counts_E, num_tokens=batch.num_tokens, top_k=2, capacity_factor=1.0)
    assert rate > of_the_sum


def test_a_dense_model_has_no_balance():
    spec = SpecConfig.model_validate({**MOE, "moe": None, "ffn_size": 24}, strict=False).to_spec()
    model = initialize(Transformer(spec), seed=0)
    sums = accumulate_gradients(model, make_batch(3), Objective(), [])
    assert sums.totals_L == [] and float(sums.z) == 0.0
    assert all(parameter.grad is not None for parameter in model.parameters())
