from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import skymoe.ops.loss
from skymoe.ops.loss import linear_cross_entropy, reference_cross_entropy


def make(
    num_tokens: int, d: int, vocab: int, *, ignored: float = 0.3, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, d, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, d, generator=generator) / d**0.5).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (num_tokens,), generator=generator)
    return hidden, weight, targets.masked_fill(torch.rand(num_tokens, generator=generator) < ignored, -100)


def test_by_hand() -> None:
    """Logits (0, ln 3): probabilities 1/4 and 3/4."""
    weight = torch.tensor([[0.0], [1.0]])
    hidden = torch.tensor([[3.0]]).log()
    loss, count = linear_cross_entropy(hidden, weight, torch.tensor([0]))
    assert float(loss) == pytest.approx(torch.tensor(4.0).log()) and int(count) == 1


@settings(deadline=None, max_examples=40)
@given(num_tokens=st.integers(1, 23), vocab=st.integers(2, 19), chunk=st.integers(1, 120), seed=st.integers(0, 999))
def test_value_and_gradients_are_the_reference_at_every_chunk_boundary(
    num_tokens: int, vocab: int, chunk: int, seed: int
) -> None:
    hidden, weight, targets = make(num_tokens, 5, vocab, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(skymoe.ops.loss, "_CHUNK_LOGITS", chunk)
        loss, count = linear_cross_entropy(hidden, weight, targets)
    expected = reference_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(loss, expected)
    assert int(count) == int((targets != -100).sum())
    found = torch.autograd.grad(loss / 7, (hidden, weight))
    wanted = torch.autograd.grad(expected / 7, (hidden, weight))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert (found[0][targets == -100] == 0).all()


def test_gradcheck() -> None:
    hidden, weight, targets = make(6, 3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets)[0], (hidden, weight))


def test_leading_dims() -> None:
    hidden, weight, targets = make(12, 4, 9)
    flat, _ = linear_cross_entropy(hidden, weight, targets)
    shaped, count = linear_cross_entropy(hidden.view(3, 4, 4), weight, targets.view(3, 4))
    assert shaped.equal(flat) and count.shape == ()


def test_nothing_is_scored() -> None:
    hidden, weight, _ = make(4, 3, 5)
    loss, count = linear_cross_entropy(hidden, weight, torch.full((4,), -100))
    loss.backward()
    assert loss.item() == 0 and int(count) == 0
    assert hidden.grad is not None and (hidden.grad == 0).all()
    assert weight.grad is not None and (weight.grad == 0).all()


def test_no_tokens() -> None:
    hidden, weight, _ = make(4, 3, 5)
    loss, count = linear_cross_entropy(hidden[:0], weight, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0 and int(count) == 0


@pytest.mark.parametrize("bad", [-1, 5, 99])
def test_a_target_outside_the_vocabulary_is_refused(bad: int) -> None:
    """Scored as some other token it would train the model on it, silently."""
    hidden, weight, _ = make(2, 3, 5)
    with pytest.raises((IndexError, RuntimeError)):
        linear_cross_entropy(hidden, weight, torch.tensor([1, bad]))


def test_autocast_bf16_is_close_to_autocast_of_the_reference() -> None:
    hidden, weight, targets = make(50, 32, 40)
    expected = reference_cross_entropy(hidden, weight, targets)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = linear_cross_entropy(hidden, weight, targets)
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, expected, rtol=5e-3, atol=0)
    found, wanted = (torch.autograd.grad(value, (hidden, weight)) for value in (loss, expected))
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype is torch.float32
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.9999


def test_bf16_weights_lose_nothing_over_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of chunks' gradients, each far below the sum: added up in bf16 they would vanish."""
    monkeypatch.setattr(skymoe.ops.loss, "_CHUNK_LOGITS", 4)
    hidden = torch.full((1000, 2), 0.5, dtype=torch.bfloat16)
    weight = torch.zeros(4, 2, dtype=torch.bfloat16, requires_grad=True)
    loss, _ = linear_cross_entropy(hidden, weight, torch.zeros(1000, dtype=torch.int64))
    loss.backward()
    assert weight.grad is not None and weight.grad.dtype is torch.bfloat16
    torch.testing.assert_close(
        weight.grad.float(), torch.tensor([[-375.0], [125.0], [125.0], [125.0]]).expand(4, 2), rtol=0.01, atol=0
    )


def test_evaluation_forms_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters always want one, but under no_grad two of the three matmuls are for nothing."""
    hidden, weight, targets = make(6, 3, 5)
    allocated = []
    zeros_like = torch.zeros_like

    def spy(tensor: Tensor, **options: object) -> Tensor:
        allocated.append(tuple(tensor.shape))
        return zeros_like(tensor, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "zeros_like", spy)
    with torch.no_grad():
        loss, _ = linear_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad and (5, 3) not in allocated


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_one_side_frozen(frozen: str) -> None:
    hidden, weight, targets = make(6, 3, 5)
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    moving = weight if frozen == "hidden" else hidden
    loss, _ = linear_cross_entropy(hidden, weight, targets)
    expected = reference_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(torch.autograd.grad(loss, moving), torch.autograd.grad(expected, moving))


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[1e4, -1e4]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], requires_grad=True)
    loss, _ = linear_cross_entropy(hidden, weight, torch.tensor([1]))
    loss.backward()
    assert loss.item() == pytest.approx(2e4) and hidden.grad is not None and hidden.grad.isfinite().all()
