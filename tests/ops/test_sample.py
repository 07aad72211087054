from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from skymoe.base.errors import ConfigError, SkymoeError
from skymoe.ops.sample import filtered_probabilities, sample

NUM_DRAWS = 40_000


def frequencies(logits_V: list[float], **options: float) -> list[float]:
    """How often each token is drawn, by one large batch."""
    logits = torch.tensor(logits_V).expand(NUM_DRAWS, -1)
    ids = sample(logits, generator=torch.Generator().manual_seed(3), **options)  # type: ignore[arg-type]
    return (torch.bincount(ids, minlength=len(logits_V)) / NUM_DRAWS).tolist()


def softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(x) for x in logits]
    return [w / sum(weights) for w in weights]


LOGITS = [0.3, -1.2, 2.0, 0.9, -0.1]  # order by size: 2, 3, 0, 4, 1
TOLERANCE = 4 * 0.5 / math.sqrt(NUM_DRAWS)  # four standard deviations of a fair coin


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_scales_the_logits(temperature: float) -> None:
    expected = softmax([x / temperature for x in LOGITS])
    assert frequencies(LOGITS, temperature=temperature) == pytest.approx(expected, abs=TOLERANCE)


def test_top_k_keeps_the_k_largest_and_their_ratios() -> None:
    kept = softmax([LOGITS[2], LOGITS[3]])
    assert frequencies(LOGITS, top_k=2) == pytest.approx([0, 0, kept[0], kept[1], 0], abs=TOLERANCE)
    assert frequencies(LOGITS, top_k=99) == pytest.approx(softmax(LOGITS), abs=TOLERANCE)


def test_top_p_keeps_the_fewest_tokens_that_reach_p() -> None:
    probs = [0.5, 0.3, 0.15, 0.05]
    logits = [math.log(p) for p in probs]
    assert frequencies(logits, top_p=0.79) == pytest.approx([0.625, 0.375, 0, 0], abs=TOLERANCE)
    assert frequencies(logits, top_p=0.81)[2] == pytest.approx(0.15 / 0.95, abs=TOLERANCE)
    assert frequencies(logits, top_p=0.01) == [1, 0, 0, 0]


def test_all_three_together() -> None:
    scaled = softmax([LOGITS[2] / 1.5, LOGITS[3] / 1.5, LOGITS[0] / 1.5])
    assert scaled[0] < 0.7 < scaled[0] + scaled[1]
    expected = softmax([LOGITS[2] / 1.5, LOGITS[3] / 1.5])
    found = frequencies(LOGITS, temperature=1.5, top_k=3, top_p=0.7)
    assert found == pytest.approx([0, 0, expected[0], expected[1], 0], abs=TOLERANCE)


def test_zero_temperature_is_greedy_and_takes_the_first_of_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, -1.0, 4.0]], dtype=torch.bfloat16)
    assert sample(logits, temperature=0).tolist() == [1, 0]


def test_a_tiny_temperature_is_greedy_without_overflow() -> None:
    assert frequencies([1e4, 9.999e3, -1e4], temperature=1e-6) == [1, 0, 0]


def test_a_seed_fixes_the_draws() -> None:
    logits = torch.randn(16, 50, generator=torch.Generator().manual_seed(0))
    draws = [sample(logits, generator=torch.Generator().manual_seed(seed)).tolist() for seed in (7, 7, 8)]
    assert draws[0] == draws[1] != draws[2]


def test_forbidden_tokens_are_never_drawn() -> None:
    assert frequencies([0.0, -math.inf, 0.0], top_p=0.999)[1] == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [[0.0, math.nan], [0.0, math.inf], [-math.inf, -math.inf]])
def test_logits_that_are_not_finite_are_refused(bad: list[float], temperature: float) -> None:
    with pytest.raises(SkymoeError, match="not finite"):
        sample(torch.tensor([[0.0, 1.0], bad]), temperature=temperature)


@pytest.mark.parametrize(
    "options", [{"temperature": -1.0}, {"temperature": math.nan}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_options_outside_their_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        sample(torch.zeros(1, 3), **options)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=9),
    top_k=st.integers(0, 9),
    top_p=st.floats(0.01, 1.0),
    temperature=st.floats(0.05, 5.0),
)
@example(logits=[0.0, 5.6296316892044673e-14], top_k=0, top_p=0.5, temperature=1.0)
def test_the_filtered_distribution_is_one_and_keeps_the_best_token(
    logits: list[float], top_k: int, top_p: float, temperature: float
) -> None:
    row = torch.tensor([logits])
    probs = filtered_probabilities(row, temperature=temperature, top_k=top_k, top_p=top_p)
    assert float(probs.sum()) == pytest.approx(1, abs=1e-5)
    assert float(probs[0, row.argmax()]) > 0
    full = (row / temperature).softmax(-1)
    ratio = probs[probs > 0] / full[probs > 0]  # what is kept keeps its proportions
    assert float(ratio.max() / ratio.min()) == pytest.approx(1, rel=1e-3)
