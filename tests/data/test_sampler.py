from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skymoe.base.errors import ConfigError, FormatError
from skymoe.data.packing import Batch
from skymoe.data.sampler import Mixture, Source, batch


@pytest.fixture
def mixture(write_tokens) -> Mixture:
    sources = [
        Source(write_tokens(name, size), weight) for name, size, weight in (("a", 997, 7), ("b", 310, 2), ("c", 64, 1))
    ]
    return Mixture(sources, sequence_length=12, seed=5, isolate_documents=True)


def equal(one: Batch, other: Batch) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def stack(parts: list[Batch]) -> Batch:
    return Batch._make(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


@given(st.integers(0, 10**12), st.integers(1, 30), st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_division_into_ranks_and_micro_batches_gives_the_same_samples(
    mixture: Mixture, first: int, count: int, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=4)))
    edges = [0, *cuts, count]
    parts = [batch(mixture, first + a, b - a) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    assert equal(batch(mixture, first, count), stack(parts))


def test_single_samples_equal_rows_of_the_batch(mixture: Mixture) -> None:
    rows = batch(mixture, 33, 20)
    for offset in range(20):
        sample = mixture.sample(33 + offset)
        assert sample.source == rows.source_B[offset]
        for one, many in zip(sample[:5], rows[:5], strict=True):
            assert np.array_equal(one, many[offset])


def test_a_new_process_goes_on_where_the_old_one_stopped(mixture: Mixture) -> None:
    again = Mixture(
        [Source(data.prefix, weight) for data, weight in zip(mixture.datasets, (7, 2, 1), strict=True)],
        sequence_length=12,
        seed=5,
        isolate_documents=True,
    )
    for step in range(50):
        batch(mixture, step * 8, 8)
    assert again.fingerprint == mixture.fingerprint
    assert equal(batch(again, 400, 8), batch(mixture, 400, 8))


@pytest.mark.parametrize("isolate", [False, True])
def test_an_epoch_scores_every_token_once(write_tokens, isolate: bool) -> None:
    documents = [list(range(i * 100, i * 100 + 1 + i % 7)) for i in range(30)]
    prefix = write_tokens("x", documents)
    mixture = Mixture([Source(prefix)], sequence_length=5, seed=1, isolate_documents=isolate)
    stream = [token for document in documents for token in document]
    windows = -(-(len(stream) - 1) // 5)
    for epoch in range(3):
        rows = batch(mixture, epoch * windows, windows)
        targets = rows.targets_BT[rows.targets_BT >= 0]
        expected = [t for d in documents for t in d[1:]] if isolate else stream[1:]
        assert sorted(targets.tolist()) == sorted(expected)
        assert rows.valid_BT.sum() == len(stream) - 1
    orders = [tuple(batch(mixture, e * windows, windows).tokens_BT[:, 0].tolist()) for e in range(3)]
    assert len(set(orders)) == 3


def test_weights_are_shares_of_the_samples(mixture: Mixture) -> None:
    rows = batch(mixture, 0, 1000)
    assert np.bincount(rows.source_B).tolist() == [700, 200, 100]
    assert mixture.names == ("a", "b", "c")
    assert mixture.epochs(1000) == pytest.approx({"a": 700 / 83, "b": 200 / 26, "c": 100 / 6})
    for source, data in enumerate(mixture.datasets):
        assert set(rows.tokens_BT[rows.source_B == source].ravel()) <= set(data.tokens.tolist()) | {0}


def test_a_source_is_shuffled_alike_in_any_company(mixture: Mixture) -> None:
    alone = Mixture([Source(mixture.datasets[1].prefix)], sequence_length=12, seed=5, isolate_documents=True)
    rows = batch(mixture, 0, 100)
    assert np.array_equal(rows.tokens_BT[rows.source_B == 1], batch(alone, 0, 20).tokens_BT)


def test_the_fingerprint_tells_every_difference(write_tokens) -> None:
    a, b = write_tokens("a", 500), write_tokens("b", 501)
    base = {"sequence_length": 8, "seed": 0}
    variants = [
        Mixture([Source(a), Source(b)], **base),
        Mixture([Source(b), Source(a)], **base),
        Mixture([Source(a), Source(b, 2.0)], **base),
        Mixture([Source(a), Source(b, name="other")], **base),
        Mixture([Source(a)], **base),
        Mixture([Source(a), Source(b)], sequence_length=9, seed=0),
        Mixture([Source(a), Source(b)], sequence_length=8, seed=1),
        Mixture([Source(a), Source(b)], **base, isolate_documents=True),
    ]
    assert len({variant.fingerprint for variant in variants}) == len(variants)
    assert Mixture([Source(a, 3), Source(b, 3)], **base).fingerprint == variants[0].fingerprint
    assert Mixture([Source(a), Source(b)], **base, vocab_size=60_000).fingerprint == variants[0].fingerprint


def test_the_last_window_is_padded(write_tokens) -> None:
    mixture = Mixture([Source(write_tokens("x", [[5, 6, 7, 8]]))], sequence_length=10, seed=0)
    sample = mixture.sample(3)
    assert sample.tokens_T.tolist() == [5, 6, 7] + [0] * 7
    assert sample.targets_T.tolist() == [6, 7, 8] + [-100] * 7
    assert sample.valid_T.tolist() == [True] * 3 + [False] * 7


def test_an_empty_batch_has_the_right_shape(mixture: Mixture) -> None:
    assert batch(mixture, 5, 0).tokens_BT.shape == (0, 12)


def test_the_stream_is_the_same_for_ever(write_tokens) -> None:
    mixture = Mixture([Source(write_tokens("a", 200), 2), Source(write_tokens("b", 90), 1)], sequence_length=4, seed=0)
    rows = batch(mixture, 0, 6)
    assert rows.source_B.tolist() == [0, 0, 1, 0, 0, 1]
    assert rows.tokens_BT[:, 0].tolist() == [124, 188, 52, 24, 96, 56]


def test_what_cannot_be_mixed_is_refused(write_tokens) -> None:
    a = write_tokens("a", 50)
    with pytest.raises(ConfigError, match="names"):
        Mixture([Source(a), Source(a)], sequence_length=4, seed=0)
    with pytest.raises(ConfigError, match="weights"):
        Mixture([], sequence_length=4, seed=0)
    with pytest.raises(ConfigError, match="at least one token"):
        Mixture([Source(a)], sequence_length=0, seed=0)
    with pytest.raises(FormatError, match="too few"):
        Mixture([Source(write_tokens("one", [[1]]))], sequence_length=4, seed=0)
    with pytest.raises(FormatError, match="float32"):
        Mixture([Source(write_tokens("f", [[1, 2, 3]], "float32"))], sequence_length=4, seed=0)
    with pytest.raises(IndexError, match="begin at 0"):
        Mixture([Source(a)], sequence_length=4, seed=0).sample(-1)
