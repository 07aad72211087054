"""Embedding and cross-entropy with the vocabulary cut over ranks, against the whole on one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from parallel.ranks import run_ranks
from torch import Tensor

import skymoe.parallel.vocabulary
from skymoe.ops.loss import linear_cross_entropy, reference_cross_entropy
from skymoe.parallel.mesh import Group
from skymoe.parallel.vocabulary import vocabulary_cross_entropy, vocabulary_embedding
from skymoe.spec.split import Split

ALONE = Group((0,), 0, None)
SPLITS = [Split((7, 6)), Split((5, 0, 8)), Split((0, 13)), Split((1, 11, 1))]


def world() -> Group:
    return Group(tuple(range(dist.get_world_size())), dist.get_rank(), dist.group.WORLD)


def make(num_tokens: int, d: int, vocab: int, dtype: torch.dtype, *, ignored: float = 0.3) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(num_tokens + vocab)
    hidden = torch.randn(num_tokens, d, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, d, generator=generator) / d**0.5).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (num_tokens,), generator=generator)
    return hidden, weight, targets.masked_fill(torch.rand(num_tokens, generator=generator) < ignored, -100)


def part(weight: Tensor, rows: Split, rank: int) -> Tensor:
    own = rows.part(rank)
    return weight.detach()[own.start : own.stop].clone().requires_grad_()


def embedded(rows: Split) -> tuple[Tensor, Tensor]:
    """Both ways in which a caller sums it would do; here by hand."""
    group = world()
    _, weight, _ = make(4, 3, rows.num_units, torch.float64)
    own = part(weight, rows, group.rank)
    tokens = torch.arange(2 * rows.num_units).view(2, -1) % rows.num_units
    x_BTD = vocabulary_embedding(tokens, own, rows, group)
    x_BTD.backward(torch.arange(x_BTD.numel(), dtype=torch.float64).view_as(x_BTD))
    whole = x_BTD.detach().clone()
    dist.all_reduce(whole)
    assert own.grad is not None
    return whole, own.grad


@pytest.mark.parametrize("rows", SPLITS)
def test_embedding_and_its_gradient(rows: Split) -> None:
    found: list[Any] = run_ranks(rows.num_ranks, embedded, rows)
    _, weight, _ = make(4, 3, rows.num_units, torch.float64)
    tokens = torch.arange(2 * rows.num_units).view(2, -1) % rows.num_units
    expected = F.embedding(tokens, weight)
    expected.backward(torch.arange(expected.numel(), dtype=torch.float64).view_as(expected))
    assert all(whole.equal(expected) for whole, _ in found)
    torch.testing.assert_close(torch.cat([grad for _, grad in found]), weight.grad, rtol=0, atol=0)


def scored(rows: Split, dtype: torch.dtype, chunk: int, autocast: bool, ignored: float, summed: bool) -> Any:
    skymoe.parallel.vocabulary._CHUNK_LOGITS = chunk  # this process is the test's own
    group = world()
    hidden, weight, targets = make(23, 5, rows.num_units, dtype, ignored=ignored)
    own = part(weight, rows, group.rank)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = vocabulary_cross_entropy(hidden, own, targets, rows, group, sum_gradient=summed)
    (loss / 7).backward()
    assert hidden.grad is not None and own.grad is not None
    return loss.detach(), hidden.grad, own.grad


@pytest.mark.parametrize("chunk", [1, 40, 1 << 20], ids=["a token each", "several", "one chunk"])
@pytest.mark.parametrize("rows", SPLITS)
def test_loss_and_gradients_are_the_whole_ones(rows: Split, chunk: int) -> None:
    hidden, weight, targets = make(23, 5, rows.num_units, torch.float64)
    expected = reference_cross_entropy(hidden, weight, targets)
    (expected / 7).backward()
    found = run_ranks(rows.num_ranks, scored, rows, torch.float64, chunk, False, 0.3, True)
    for loss, grad_hidden, _ in found:
        assert loss.equal(found[0][0]) and grad_hidden.equal(found[0][1])
    torch.testing.assert_close(found[0][0], expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[0][1], hidden.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([grad for *_, grad in found]), weight.grad, rtol=1e-12, atol=1e-12)


def test_in_fp32() -> None:
    rows = Split((7, 6))
    hidden, weight, targets = make(23, 5, 13, torch.float32)
    expected = reference_cross_entropy(hidden, weight, targets)
    (expected / 7).backward()
    found = run_ranks(2, scored, rows, torch.float32, 40, False, 0.3, True)
    torch.testing.assert_close(found[0][0], expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[0][1], hidden.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat([grad for *_, grad in found]), weight.grad, rtol=1e-5, atol=1e-6)


def test_terms_of_the_gradient_sum_to_the_whole() -> None:
    """`sum_gradient=False` is for hidden states whose gather sums the terms in its backward pass."""
    rows = Split((5, 0, 8))
    complete = run_ranks(3, scored, rows, torch.float64, 40, False, 0.3, True)
    terms = run_ranks(3, scored, rows, torch.float64, 40, False, 0.3, False)
    torch.testing.assert_close(sum(term for _, term, _ in terms), complete[0][1], rtol=1e-12, atol=1e-14)
    assert not terms[0][1].equal(complete[0][1]) and (terms[1][1] == 0).all()


def test_autocast_is_that_of_one_rank() -> None:
    hidden, weight, targets = make(23, 5, 13, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = linear_cross_entropy(hidden, weight, targets)
    (expected / 7).backward()
    found = run_ranks(2, scored, Split((7, 6)), torch.float32, 40, True, 0.3, True)
    assert found[0][0].dtype is torch.float32 and found[0][1].dtype is torch.float32
    torch.testing.assert_close(found[0][0], expected.detach(), rtol=1e-5, atol=0)
    for ours, wanted in ((found[0][1], hidden.grad), (torch.cat([grad for *_, grad in found]), weight.grad)):
        assert wanted is not None and F.cosine_similarity(ours.flatten(), wanted.flatten(), dim=0) > 0.9999


def test_nothing_is_scored() -> None:
    for loss, grad_hidden, grad_weight in run_ranks(2, scored, Split((7, 6)), torch.float32, 40, False, 1.0, True):
        assert loss == 0 and (grad_hidden == 0).all() and (grad_weight == 0).all()


def without_gradient(rows: Split) -> tuple[bool, float]:
    group = world()
    hidden, weight, targets = make(23, 5, rows.num_units, torch.float64)
    with torch.no_grad():
        loss = vocabulary_cross_entropy(hidden, part(weight, rows, group.rank), targets, rows, group)
    return loss.requires_grad, float(loss)


def test_evaluation() -> None:
    hidden, weight, targets = make(23, 5, 13, torch.float64)
    expected = float(reference_cross_entropy(hidden, weight, targets).detach())
    assert run_ranks(2, without_gradient, Split((7, 6))) == [(False, pytest.approx(expected, rel=1e-12))] * 2


def test_a_rank_alone_needs_no_group() -> None:
    hidden, weight, targets = make(6, 3, 5, torch.float64)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return vocabulary_cross_entropy(hidden, weight, targets, Split((5,)), ALONE)

    torch.testing.assert_close(loss(hidden, weight), reference_cross_entropy(hidden, weight, targets))
    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_no_tokens() -> None:
    hidden, weight, _ = make(6, 3, 5, torch.float32)
    none = torch.zeros(0, dtype=torch.int64)
    loss = vocabulary_cross_entropy(hidden[:0], weight, none, Split((5,)), ALONE)
    loss.backward()
    assert loss.item() == 0 and weight.grad is not None and (weight.grad == 0).all()


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[1e4, -1e4]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], requires_grad=True)
    loss = vocabulary_cross_entropy(hidden, weight, torch.tensor([1]), Split((3,)), ALONE)
    loss.backward()
    assert loss.item() == pytest.approx(2e4) and hidden.grad is not None and hidden.grad.isfinite().all()


@pytest.mark.parametrize("bad", [-1, 5, 99])
def test_an_id_outside_the_vocabulary_is_refused(bad: int) -> None:
    """No rank has it: scored with a logit of 0, or embedded as zeros, it would train the model on nothing, silently."""
    hidden, weight, _ = make(2, 3, 5, torch.float32)
    ids = torch.tensor([1, bad])
    with pytest.raises(RuntimeError, match="outside the vocabulary"):
        vocabulary_cross_entropy(hidden, weight, ids, Split((5,)), ALONE)
    with pytest.raises(RuntimeError, match="outside the vocabulary"):
        vocabulary_embedding(ids, weight, Split((5,)), ALONE)
