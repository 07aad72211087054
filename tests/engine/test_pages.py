"""The page table: holders, what is found again, and what is thrown out first."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from skymoe.engine.pages import PageTable, page_keys

TOKENS = st.lists(st.integers(0, 2), max_size=12)


@given(TOKENS, TOKENS, st.integers(1, 3))
def test_keys_are_equal_where_the_beginnings_are_and_nowhere_else(left, right, page_size) -> None:
    keys, others = page_keys(left, page_size), page_keys(right, page_size)
    assert len(keys) == len(left) // page_size
    for i, key in enumerate(keys):
        for j, other in enumerate(others):
            same = i == j and left[: (i + 1) * page_size] == right[: (j + 1) * page_size]
            assert (key == other) == same


def test_tokens_that_collide_under_the_hash_of_python_have_different_keys() -> None:
    mersenne = 2**61 - 1  # hash(n) is n modulo this number
    assert hash((mersenne, 1)) == hash((0, 1))
    assert page_keys((mersenne, 1), 2) != page_keys((0, 1), 2)


def published(table: PageTable, tokens: range) -> list[int]:
    """Pages with the content of `tokens`, published and held."""
    keys = page_keys(tokens, table.page_size)
    opened = table.open(keys, len(keys))
    assert opened is not None
    for page, key in zip(opened.pages, keys, strict=True):
        table.publish(page, key)
    return opened.pages


def test_a_known_beginning_is_found_while_it_is_held_and_after() -> None:
    table = PageTable(8, 2)
    pages = published(table, range(6))
    while_held = table.open(page_keys(range(6), 2), 4)
    assert while_held is not None and while_held.pages[:3] == pages and while_held.num_found == 3
    table.release(pages)
    table.release(while_held.pages)
    assert (table.num_free, table.num_cached) == (8, 3)
    after = table.open(page_keys((0, 1, 2, 3, 9, 9), 2), 3)
    assert after is not None and after.pages[:2] == pages[:2] and after.num_found == 2
    assert (table.num_free, table.num_cached) == (5, 1)


def test_pages_are_found_in_whole_groups() -> None:
    table = PageTable(8, 2)
    table.release(published(table, range(10)))
    opened = table.open(page_keys(range(10), 2), 5, multiple=2)
    assert opened is not None and opened.num_found == 4


def test_without_sharing_nothing_is_found() -> None:
    table = PageTable(4, 2, share=False)
    table.release(published(table, range(8)))
    opened = table.open(page_keys(range(8), 2), 4)
    assert table.num_cached == 0 and opened is not None and opened.num_found == 0


def test_empty_pages_go_first_then_the_longest_released_and_ends_before_beginnings() -> None:
    table = PageTable(6, 1)
    old, new = published(table, range(2)), published(table, range(10, 12))
    table.release(old)
    table.release(new)
    taken = table.open([], 2)  # two were never used
    assert taken is not None and not {*taken.pages} & {*old, *new}
    more: list[int] = []
    while table.extend(more):
        pass
    assert more == [old[1], old[0], new[1], new[0]]
    assert (table.num_free, table.num_cached) == (0, 0)


def test_a_page_given_to_another_is_not_found_any_more() -> None:
    table = PageTable(2, 1)
    table.release(published(table, range(2)))
    taken = table.open([], 1)
    assert taken is not None
    table.release(taken.pages)
    opened = table.open(page_keys(range(2), 1), 2)
    assert opened is not None and opened.num_found == 1  # the end went first


def test_forgotten_pages_are_not_found_by_anybody_and_come_back_empty() -> None:
    table = PageTable(4, 1)
    pages = published(table, range(3))
    table.forget(pages)
    again = table.open(page_keys(range(3), 1), 1)
    assert again is not None and again.num_found == 0
    table.release(pages)
    assert (table.num_free, table.num_cached) == (3, 0)


def test_what_cannot_be_had_changes_nothing() -> None:
    table = PageTable(4, 1)
    pages = published(table, range(3))
    table.release(pages)
    assert table.open(page_keys(range(3), 1), 5) is None
    assert table.open(page_keys(range(3), 1), 3, spare=2) is None
    assert table.open([], 4, spare=1) is None
    assert (table.num_free, table.num_cached) == (4, 3)
    assert table.open(page_keys(range(3), 1), 3, spare=1) is not None


class Tables(RuleBasedStateMachine):
    """Requests come and go at random; beside the table a plain account of who holds which page, and of its content."""

    NUM_PAGES = 7

    def __init__(self) -> None:
        super().__init__()
        self.table = PageTable(self.NUM_PAGES, 1)
        self.held: list[list[int]] = []
        self.content: dict[int, tuple[int, ...]] = {}

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=5), more=st.integers(0, 2), spare=st.integers(0, 2))
    def open(self, tokens, more, spare) -> None:
        keys, want = page_keys(tokens, 1), len(tokens) + more
        free, known = self.table.num_free, self.table.num_cached
        opened = self.table.open(keys, want, spare=spare)
        if opened is None:
            assert (self.table.num_free, self.table.num_cached) == (free, known)
            assert want + spare > free - len(tokens)
            return
        assert len(opened.pages) == len(set(opened.pages)) == want
        assert self.table.num_free >= spare
        for index, page in enumerate(opened.pages):
            if index < opened.num_found:
                assert self.content[page] == tuple(tokens[: index + 1])
            else:
                assert all(page not in pages for pages in self.held), "a page with content of another was given away"
                self.content[page] = ()
        for index in range(opened.num_found, len(tokens)):
            self.content[opened.pages[index]] = tuple(tokens[: index + 1])
            self.table.publish(opened.pages[index], keys[index])
        self.held.append(opened.pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def extend(self, data) -> None:
        pages = data.draw(st.sampled_from(self.held))
        could, before = self.table.num_free > 0, list(pages)
        assert self.table.extend(pages) == could
        assert pages[: len(before)] == before and len(pages) == len(before) + could
        if could:
            assert sum(pages[-1] in others for others in self.held) == 1
            self.content[pages[-1]] = ()

    @precondition(lambda self: self.held)
    @rule(data=st.data(), forget=st.booleans())
    def release(self, data, forget) -> None:
        pages = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        if forget:
            self.table.forget(pages)
        self.table.release(pages)

    @invariant()
    def each_page_is_held_or_free(self) -> None:
        holders = Counter(page for pages in self.held for page in pages)
        assert self.table.num_free == self.NUM_PAGES - len(holders)
        assert 0 <= self.table.num_cached <= self.table.num_free


TestTables = Tables.TestCase
TestTables.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
