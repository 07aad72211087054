"""Paged attention: the specification, row invariance, and nothing from slots that are not a row's own."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skymoe.ops.paged import PagedBatch, paged_attention, reference_attention
from skymoe.ops.paged_store import PagedStore

FP8 = torch.float8_e4m3fn


@dataclass
class Case:
    """Random sequences, some decoding, some reading, each in random pages of one store; other pages hold junk."""

    seed: int
    page_size: int
    heads: tuple[int, ...]
    width: int
    dtype: torch.dtype = torch.float32
    longest: int = 300

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        torch.manual_seed(self.seed)
        self.groups = max(self.heads, default=0) + 1
        lengths = [self.random.randint(1, self.longest) for _ in range(self.random.randint(1, 6))]
        self.rows = [self.random.choice([1, 1, self.random.randint(1, length)]) for length in lengths]
        self.starts = [length - rows for length, rows in zip(lengths, self.rows, strict=True)]
        num = [-(-length // self.page_size) for length in lengths]
        self.num_pages = sum(num) + 3
        shuffled = self.random.sample(range(self.num_pages), self.num_pages)
        self.pages = [tuple(shuffled.pop() for _ in range(count)) for count in num]
        self.keys, self.values = (self._filled() for _ in range(2))
        self.q_NHC = torch.randn(sum(self.rows), len(self.heads), self.width)

    def _filled(self) -> PagedStore:
        slots = self.num_pages * self.page_size
        store = PagedStore(self.groups, self.num_pages, self.page_size, self.width, self.dtype)
        store.write(torch.randn(slots, self.groups, self.width), torch.arange(slots))
        return store

    def batch(self) -> PagedBatch:
        return PagedBatch.of(list(zip(self.rows, self.starts, self.pages, strict=True)), self.page_size)

    def all(self, store: PagedStore) -> Tensor:
        return store.read(torch.arange(self.num_pages))

    def attend(self, window: int | None) -> Tensor:
        return paged_attention(self.q_NHC, self.keys, self.values, self.batch(), self.heads, window)


CASES = st.builds(
    Case,
    seed=st.integers(0, 2**31),
    page_size=st.sampled_from([1, 3, 16, 32, 200]),
    heads=st.sampled_from([(0,), (0, 1, 2), (0, 0, 1, 1), (0, 0, 0, 1, 1), (1, 0, 1, 0, 0), (0,) * 9, (2, 0)]),
    width=st.sampled_from([4, 10, 16, 18, 40, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, FP8]),
)
WINDOWS = st.sampled_from([None, None, 1, 7, 130, 1000])


@settings(deadline=None, max_examples=80)
@given(case=CASES, window=WINDOWS)
def test_it_is_the_specification(case: Case, window: int | None) -> None:
    keys, values = case.all(case.keys), case.all(case.values)
    wanted = reference_attention(case.q_NHC, keys, values, case.batch(), case.heads, window)
    torch.testing.assert_close(case.attend(window), wanted, rtol=2e-5, atol=2e-6)


@settings(deadline=None, max_examples=80)
@given(case=CASES, window=WINDOWS)
def test_a_row_is_the_same_alone_and_in_any_chunk(case: Case, window: int | None) -> None:
    together = case.attend(window)
    first = 0
    for rows, start, pages in zip(case.rows, case.starts, case.pages, strict=True):
        for i in {0, rows - 1, case.random.randrange(rows)}:
            low = case.random.randint(0, i)  # a chunk low .. high around the row
            high = case.random.choice([i, case.random.randint(i, rows - 1)])
            batch = PagedBatch.of([(high - low + 1, start + low, pages)], case.page_size)
            q = case.q_NHC[first + low : first + high + 1]
            y = paged_attention(q, case.keys, case.values, batch, case.heads, window)
            assert torch.equal(y[i - low], together[first + i])
        first += rows


@settings(deadline=None, max_examples=60)
@given(case=CASES, window=WINDOWS, junk=st.sampled_from([float("nan"), float("inf"), 1e30]))
def test_what_a_row_does_not_see_never_counts(case: Case, window: int | None, junk: float) -> None:
    """Neither the slots of others nor later tokens of the same sequence, as the first rows of a chunk find them."""
    clean = case.attend(window)
    at = case.random.randrange(len(case.rows))
    own = {page * case.page_size + i for page in case.pages[at] for i in range(case.page_size)}
    last = case.starts[at] + case.random.randrange(case.rows[at])  # the last row that must not notice
    seen = {case.pages[at][p // case.page_size] * case.page_size + p % case.page_size for p in range(last + 1)}
    assert seen <= own
    others = torch.tensor(sorted(set(range(case.num_pages * case.page_size)) - seen), dtype=torch.int64)
    for store in (case.keys, case.values):
        store.write(torch.full((len(others), case.groups, case.width), junk), others)
    first = sum(case.rows[:at])
    some = slice(first, first + last - case.starts[at] + 1)
    assert torch.equal(case.attend(window)[some], clean[some])


def test_a_row_that_sees_nan_is_nan() -> None:
    case = Case(3, 16, (0, 1), 16)
    batch = PagedBatch.of([(5, 20, (0, 1))], 16)
    q = torch.randn(5, 2, 16)
    bad = torch.randn(1, 2, 16)
    bad[0, 1, 3] = float("nan")
    case.values.write(bad, torch.tensor([22]))
    y = paged_attention(q, case.keys, case.values, batch, (0, 1))
    assert y[:, 0].isfinite().all() and y[:2].isfinite().all()
    assert y[2:, 1].isnan().all()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads: int) -> None:
    case = Case(11, 16, (0, 0, 0, 1), 128)
    before = torch.get_num_threads()
    wanted = case.attend(None)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(case.attend(None), wanted)
    finally:
        torch.set_num_threads(before)


def test_no_heads_and_no_rows() -> None:
    empty = PagedStore(0, 4, 16, 8, torch.float32)
    batch = PagedBatch.of([(3, 0, (1,)), (1, 9, (2,))], 16)
    empty.write(torch.empty(4, 0, 8), batch.slots_N)
    assert paged_attention(torch.empty(4, 0, 8), empty, empty, batch, ()).shape == (4, 0, 8)
    store = PagedStore(2, 4, 16, 8, FP8)
    nothing = PagedBatch.of([], 16)
    store.write(torch.empty(0, 2, 8), nothing.slots_N)
    assert paged_attention(torch.empty(0, 2, 8), store, store, nothing, (0, 1)).shape == (0, 2, 8)


def test_slots_and_positions() -> None:
    batch = PagedBatch.of([(3, 3, (5, 2)), (0, 4, (1, 3)), (1, 0, (7,))], 4)
    assert batch.positions_N.tolist() == [3, 4, 5, 0]
    assert batch.slots_N.tolist() == [5 * 4 + 3, 2 * 4, 2 * 4 + 1, 28]


def test_bf16_queries_give_bf16() -> None:
    case = Case(5, 16, (0, 0), 32, torch.bfloat16)
    case.q_NHC = case.q_NHC.bfloat16()
    wanted = reference_attention(case.q_NHC, case.all(case.keys), case.all(case.values), case.batch(), case.heads)
    assert case.attend(None).dtype == torch.bfloat16
    torch.testing.assert_close(case.attend(None), wanted, rtol=0.01, atol=1e-3)
