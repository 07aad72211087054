"""The sampler against a plain reference, one row at a time, and against transformers' logits processors."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skymoe.engine.params import SamplingParams
from skymoe.engine.request import Sampled, SampleRow
from skymoe.engine.sampling import Sampler, token_logprobs, uniform
from skymoe.ops.sample import best_first, filtered_weights

INF = math.inf


def row(params: SamplingParams, **fields: Any) -> SampleRow:
    values: dict[str, Any] = {"request_id": "r", "prompt": (0,), "output": (), "seed": 0, "num_drawn": 0}
    return SampleRow(params=params, **{**values, **fields})


def sample(logits_RV: Any, *rows: SampleRow) -> list[Sampled]:
    logits = torch.as_tensor(logits_RV, dtype=torch.float32)
    return Sampler(logits.shape[-1]).sample(logits, rows)


# ---- the specification: one row, plain loops


def reference(logits: list[float], asked: SampleRow) -> int | None:
    """The token, or None where none can be drawn."""
    x, params = [np.float32(value) for value in logits], asked.params
    if any(math.isnan(value) or value == INF for value in x) or all(value == -INF for value in x):
        return None
    for token in {*asked.prompt, *asked.output}:
        penalty = np.float32(params.repetition_penalty)
        x[token] = x[token] / penalty if x[token] > 0 else x[token] * penalty
    for token in set(asked.output):
        count = asked.output.count(token)  # type: ignore[attr-defined]
        x[token] -= np.float32(params.presence_penalty + np.float32(params.frequency_penalty * count))
    for token, bias in params.logit_bias.items():
        x[token] += np.float32(bias)
    for token in asked.banned:
        x[token] = np.float32(-INF)
    best = max(x)
    if not math.isfinite(best):
        return None
    if params.temperature == 0:
        return x.index(best)
    weights = [math.exp((float(value) - float(best)) / params.temperature) for value in x]
    order = sorted(range(len(x)), key=lambda token: (-x[token], token))
    kept = [token for token in order if weights[token] >= params.min_p]
    if params.top_k:
        kept = [token for token in kept if x[token] >= x[order[min(params.top_k, len(x)) - 1]]]
    total, before, nucleus = sum(weights[token] for token in kept), 0.0, []
    for token in kept:
        if before < params.top_p * total or not nucleus:
            nucleus.append(token)
        before += weights[token]
    aim = uniform(asked.seed, asked.num_drawn) * sum(weights[token] for token in nucleus)
    reached = 0.0
    for token in sorted(nucleus):
        reached += weights[token]
        if reached > aim:
            return token
    return max(nucleus)


VOCAB = 11
tokens = st.integers(0, VOCAB - 1)
values = st.one_of(st.floats(-30, 30, width=32), st.integers(-3, 3).map(float), st.sampled_from([-INF, INF, math.nan]))
finite = st.one_of(st.floats(-30, 30, width=32), st.integers(-3, 3).map(float), st.just(-INF))
parameters = st.builds(
    SamplingParams,
    temperature=st.one_of(st.just(0.0), st.just(1.0), st.floats(0.01, 5)),
    top_k=st.integers(0, VOCAB + 1),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 1)),
    min_p=st.one_of(st.just(0.0), st.floats(0, 1)),
    presence_penalty=st.sampled_from([0.0, 0.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.25, -1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.5, 0.5]),
    logit_bias=st.dictionaries(tokens, st.sampled_from([-100.0, -1.5, 2.0, 100.0]), max_size=3),
    logprobs=st.one_of(st.none(), st.integers(0, 5)),
)
rows = st.builds(
    row,
    parameters,
    prompt=st.lists(tokens, min_size=1, max_size=5).map(tuple),
    output=st.lists(tokens, max_size=6),
    seed=st.integers(0, 2**63 - 1),
    num_drawn=st.integers(0, 2**40),
    banned=st.lists(tokens, max_size=2).map(tuple),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.lists(st.one_of(finite, values), min_size=VOCAB, max_size=VOCAB), rows), max_size=6))
def test_a_batch_is_what_each_row_is_alone(batch: list[tuple[list[float], SampleRow]]) -> None:
    asked = [each for _, each in batch]
    found = Sampler(VOCAB).sample(torch.tensor([logits for logits, _ in batch]).view(-1, VOCAB), asked)
    assert [answer.token_id for answer in found] == [reference(*each) for each in batch]
    for answer, each in zip(found, asked, strict=True):
        assert (answer.token_id is None) == bool(answer.error)
        wants = each.params.logprobs is not None and not answer.error
        assert (answer.logprobs is not None) == wants and (
            not wants or len(answer.logprobs.top) == each.params.logprobs
        )  # type: ignore[union-attr]


def mixed_rows(count: int, vocab: int) -> list[SampleRow]:
    generator = np.random.default_rng(5)
    options: list[dict[str, Any]] = [
        {"temperature": 0}, {}, {"top_p": 0.9}, {"top_k": 40}, {"top_k": 7, "top_p": 0.5, "temperature": 1.7},
        {"min_p": 0.05, "logprobs": 5}, {"repetition_penalty": 1.3, "logprobs": 0},
        {"frequency_penalty": 0.5, "top_p": 0.99},
    ]  # fmt: skip
    return [
        row(
            SamplingParams(**options[i % len(options)]),
            prompt=tuple(generator.integers(0, vocab, 20).tolist()),
            output=generator.integers(0, vocab, 30).tolist(),
            seed=i,
            num_drawn=i * i,
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("threads", [1, 2])
def test_company_changes_nothing_not_even_the_last_bit(threads: int) -> None:
    vocab = 40_000
    logits = 4 * torch.randn(16, vocab, generator=torch.Generator().manual_seed(0))
    asked, sampler = mixed_rows(16, vocab), Sampler(vocab)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = sampler.sample(logits, asked)
        backwards = sampler.sample(logits.flip(0), asked[::-1])[::-1]
        alone = [sampler.sample(logits[i : i + 1], [asked[i]])[0] for i in range(16)]
    finally:
        torch.set_num_threads(before)
    assert together == alone == backwards
    assert len({answer.token_id for answer in together}) > 8


def test_a_draw_depends_on_seed_and_index() -> None:
    logits = torch.zeros(1, 1000)
    draws = {
        (s, i): sample(logits, row(SamplingParams(), seed=s, num_drawn=i))[0].token_id
        for s in range(4)
        for i in range(40)
    }
    assert len(set(draws.values())) > 120
    again = sample(logits, row(SamplingParams(), seed=3, num_drawn=17, request_id="other", prompt=(5, 6)))
    assert again[0].token_id == draws[3, 17]


def test_the_random_numbers_stay_what_they_are() -> None:
    """Written down once: a seed in somebody's notes must give the same text after an upgrade."""
    known = [uniform(0, 0), uniform(0, 1), uniform(1, 0), uniform(2**63 - 1, 2**40)]
    assert known == [0.8899902844498623, 0.28064613459905907, 0.9932914222609345, 0.4603344624678737]
    many = np.array([uniform(9, i) for i in range(4000)])
    assert many.min() > 0 and many.max() < 1 and abs(many.mean() - 0.5) < 0.02 and abs(many.var() - 1 / 12) < 0.005


# ---- distributions


def chi_square_limit(degrees: int) -> float:
    """Exceeded once in a million (Wilson and Hilferty)."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + 4.753 * math.sqrt(spread)) ** 3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 2, "top_k": 6, "top_p": 0.9},
    ],
    ids=str,
)
@pytest.mark.parametrize("by_index", [False, True])
def test_tokens_are_drawn_as_often_as_they_are_likely(options: dict[str, Any], by_index: bool) -> None:
    logits = torch.tensor([0.3, -1.2, 2.0, 0.9, -0.1, 1.5, -3.0, 0.0])
    draws, params = 4000, SamplingParams(**options)
    asked = [row(params, seed=7 if by_index else i, num_drawn=i if by_index else 0) for i in range(draws)]
    answers = sample(logits.expand(draws, -1), *asked)
    counts = torch.bincount(torch.tensor([answer.token_id for answer in answers]), minlength=8).double()
    weights = filtered_weights(logits[None], **{"temperature": 1.0, **options})[0]
    expected = draws * weights / weights.sum()
    kept = expected > 0
    assert counts[~kept].sum() == 0
    statistic = float(((counts - expected)[kept] ** 2 / expected[kept]).sum())
    assert statistic < chi_square_limit(int(kept.sum()) - 1)


# ---- filters: transformers is the oracle


def oracle(logits: torch.Tensor, *processors: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    scores = logits
    for processor in processors:
        scores = processor(ids if ids is not None else torch.zeros(len(logits), 1, dtype=torch.long), scores)
    return scores.softmax(-1)


@pytest.mark.parametrize("vocab", [50, 5000])
def test_filters_are_those_of_transformers(vocab: int) -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = 3 * torch.randn(20, vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(vocab)).float()
    heat, top_k = process.TemperatureLogitsWarper, process.TopKLogitsWarper
    top_p, min_p = process.TopPLogitsWarper, process.MinPLogitsWarper
    cases: list[tuple[dict[str, float], list[Any]]] = [
        ({"temperature": 0.7}, [heat(0.7)]),
        ({"temperature": 1.0, "top_k": 13}, [top_k(13)]),
        ({"temperature": 1.0, "top_k": vocab + 5}, [top_k(vocab + 5)]),
        ({"temperature": 1.0, "top_p": 0.37}, [top_p(0.37)]),
        ({"temperature": 1.0, "top_p": 0.999}, [top_p(0.999)]),
        ({"temperature": 1.0, "min_p": 0.08}, [min_p(0.08)]),
        (
            {"temperature": 1.6, "min_p": 0.01, "top_k": 40, "top_p": 0.9},
            [heat(1.6), min_p(0.01), top_k(40), top_p(0.9)],
        ),
    ]  # fmt: skip
    for options, processors in cases:
        weights = filtered_weights(logits, **options)  # type: ignore[arg-type]
        expected = oracle(logits.double(), *processors)
        assert torch.equal(weights > 0, expected > 0), options
        assert torch.allclose(weights / weights.sum(-1, keepdim=True), expected, atol=1e-6), options


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(40, 30, generator=torch.Generator().manual_seed(1))
    ids = torch.randint(0, 30, (40, 9), generator=torch.Generator().manual_seed(2))
    expected = oracle(logits, process.RepetitionPenaltyLogitsProcessor(penalty), ids=ids).argmax(-1)
    params = SamplingParams(temperature=0, repetition_penalty=penalty)
    asked = [row(params, prompt=tuple(line[:4].tolist()), output=line[4:].tolist()) for line in ids]
    assert [answer.token_id for answer in sample(logits, *asked)] == expected.tolist()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(finite, st.just(0.0)), min_size=1, max_size=30), st.data())
def test_the_best_come_first_and_the_lowest_id_among_equals(logits: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(logits)))
    expected = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[:count]
    assert best_first(torch.tensor([logits, logits]), count).tolist() == [expected, expected]


def test_top_p_of_a_flat_distribution_looks_beyond_its_first_tokens() -> None:
    """More tokens in the nucleus than are looked at first, and equals at its border: the lowest ids stay."""
    weights = filtered_weights(torch.zeros(1, 4096), temperature=1.0, top_p=0.75)
    assert (weights[0] > 0).nonzero().flatten().tolist() == list(range(3072))


# ---- penalties, bias, bans


def test_penalties_are_of_the_answer_bias_and_bans_of_all() -> None:
    greedy = {"temperature": 0.0}
    logits = [1.0, 1.4, 1.2, -5.0]
    cases = [
        (SamplingParams(**greedy), (1,), [1], (), 1),
        (SamplingParams(**greedy, presence_penalty=0.3), (1,), [1, 1], (), 2),
        (SamplingParams(**greedy, presence_penalty=0.3), (1,), [], (), 1),  # the prompt is not counted
        (SamplingParams(**greedy, frequency_penalty=0.15), (1,), [1], (), 1),
        (SamplingParams(**greedy, frequency_penalty=0.15), (1,), [1, 1], (), 2),
        (SamplingParams(**greedy, repetition_penalty=2.0), (1,), [], (), 2),  # the prompt is
        (SamplingParams(**greedy, logit_bias={3: 100.0, 99: 5.0}), (0,), [], (), 3),
        (SamplingParams(**greedy, logit_bias={3: 100.0}), (0,), [], (3, 99), 1),
    ]
    asked = [row(params, prompt=prompt, output=output, banned=banned) for params, prompt, output, banned, _ in cases]
    assert [answer.token_id for answer in sample([logits] * len(cases), *asked)] == [case[-1] for case in cases]


# ---- what cannot be answered


def test_an_error_is_that_of_its_row_only() -> None:
    good = [0.0, 2.0, 1.0]
    asked = row(SamplingParams(temperature=0, logprobs=1))
    broken = [[0.0, math.nan, 1.0], [INF, 0.0, 0.0], [-INF, -INF, -INF]]
    found = sample([good, *broken, good], asked, asked, asked, asked, replace(asked, banned=(0, 1, 2)))
    assert found[0].token_id == 1 and not found[0].error
    assert all(answer == Sampled(error=answer.error) and "not finite" in answer.error for answer in found[1:4])
    assert found[4].token_id is None and "logit_bias" in found[4].error


def test_no_rows_and_padding_columns() -> None:
    assert Sampler(3).sample(torch.zeros(0, 5), []) == []
    logits = torch.tensor([[0.0, 1.0, 0.5, 99.0, math.nan]])
    assert Sampler(3).sample(logits, [row(SamplingParams(temperature=0))])[0].token_id == 1


# ---- log-probabilities


def test_log_probabilities_are_of_the_distribution_before_any_change() -> None:
    logits = torch.randn(1, 200, generator=torch.Generator().manual_seed(4))
    params = SamplingParams(temperature=0, logprobs=4, logit_bias={7: 100.0}, repetition_penalty=1.8)
    answer = sample(logits, row(params, prompt=(1, 2, 3)))[0]
    expected = logits[0].double().log_softmax(-1)
    best = expected.argsort(descending=True)
    assert answer.token_id == 7 and answer.logprobs is not None
    assert answer.logprobs.logprob == pytest.approx(float(expected[7]), abs=1e-12)
    assert answer.logprobs.rank == 1 + best.tolist().index(7)
    assert [token for token, _ in answer.logprobs.top] == best[:4].tolist()
    assert [value for _, value in answer.logprobs.top] == pytest.approx(expected[best[:4]].tolist(), abs=1e-12)


def test_rows_of_the_prompt_are_not_drawn() -> None:
    logits = torch.randn(30, 50, generator=torch.Generator().manual_seed(6))
    params = SamplingParams(prompt_logprobs=2)
    asked = [row(params, target=i) for i in range(29)] + [row(params)]
    found = sample(logits, *asked)
    expected = logits.double().log_softmax(-1)
    assert all(answer.token_id is None for answer in found[:29]) and found[29].token_id is not None
    assert found[29].logprobs is None  # asked of the prompt only
    for i, answer in enumerate(found[:29]):
        assert answer.logprobs is not None
        assert answer.logprobs.logprob == pytest.approx(float(expected[i, i]), abs=1e-12)
        assert answer.logprobs.top[0][0] == int(logits[i].argmax()) and len(answer.logprobs.top) == 2


def test_ranks_count_equals_and_minus_infinity_is_a_number() -> None:
    found = token_logprobs(torch.tensor([[1.0, 3.0, 3.0, -INF]]), [2], 4)[0]
    assert found.rank == 2 and [token for token, _ in found.top] == [1, 2, 0, 3]
    assert found.top[3][1] == -9999.0 and found.logprob == found.top[0][1]
