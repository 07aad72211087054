"""Random traffic: whatever comes, goes, fails and is stopped, each request gets what it would get alone.

The model on paper sees the tokens through the pages it is given, so a page that was shared wrongly, given away too
early or written by two would change what is drawn.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from engine.paper_model import VOCABULARY, PaperModel, answer_alone, scheduler_of
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from skymoe.engine.admission import QueueFullError
from skymoe.engine.output import Finish, TokenOutput
from skymoe.engine.params import SamplingParams
from skymoe.engine.request import Request, Sampled
from skymoe.engine.scheduler import Scheduler
from skymoe.engine.step_builder import Scheduled

MAX_LENGTH = 40


@dataclass
class News:
    """What was heard of a request."""

    tokens: list[int] = field(default_factory=list)
    finish: Finish | None = None
    prompt_logprobs: tuple[object, ...] | None = None

    def hear(self, output: TokenOutput) -> None:
        assert self.finish is None, "news after the last"
        if output.token_id is not None:
            assert (output.num_cached_tokens is None) == bool(self.tokens)
            self.tokens.append(output.token_id)
        if output.prompt_logprobs is not None:
            assert self.prompt_logprobs is None and len(self.tokens) == 1
            self.prompt_logprobs = output.prompt_logprobs
        self.finish = output.finish


def check_pages(scheduler: Scheduler) -> None:
    """Each page is held by those who run or free, nobody runs and waits, and both are in the order of arrival."""
    batch, stats = scheduler._batch, scheduler.stats()
    holders = Counter(page for progress in batch.running for page in progress.pages)
    assert stats.free_pages == stats.num_pages - len(holders)
    assert dict(holders) == {page: n for page, n in enumerate(batch.pages._holders) if n}
    order = list(scheduler._requests.values())
    assert [*batch.running, *batch.waiting.values()] == order
    assert all(not progress.pages and not progress.computed for progress in batch.waiting.values())
    assert all(progress.computed <= len(progress.pages) * batch.pages.page_size for progress in batch.running)
    for progress in batch.running:  # a page that two hold is full: nobody writes it any more
        ahead = progress.pages[progress.computed // batch.pages.page_size :]
        assert all(holders[page] == 1 for page in ahead)


class Ledger:
    """Every position of a request is computed once, or found in the cache in whole pieces; and again when stopped."""

    def __init__(self) -> None:
        self.computed: dict[str, int] = {}
        self.restarts = 0

    def enter(self, scheduled: Scheduled, chunk_size: int) -> None:
        for progress, chunk in zip(scheduled.pieces, scheduled.step.chunks, strict=True):
            request_id, num_prompt = progress.request.id, len(progress.prompt)
            if chunk.start != self.computed.get(request_id, -1):
                assert chunk.start % chunk_size == 0 and chunk.start < num_prompt
                assert progress.request.params.prompt_logprobs is None or chunk.start == 0
                self.restarts += request_id in self.computed
            assert chunk.tokens == (*progress.prompt, *progress.output)[chunk.start : chunk.end]
            assert chunk.end == min((chunk.start // chunk_size + 1) * chunk_size, num_prompt) or (
                chunk.start >= num_prompt and len(chunk.tokens) == 1
            )
            self.computed[request_id] = chunk.end


PROMPTS = st.builds(
    lambda family, length, tail: (*(family * length)[:length], *tail),
    st.sampled_from([(1, 2, 3), (4,), (1, 2, 2)]),
    st.integers(0, 20),
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=4),
)
PARAMS = st.builds(
    lambda most, least, **rest: SamplingParams(max_tokens=most, min_tokens=min(least, most or 40), **rest),
    most=st.none() | st.integers(1, 20),
    least=st.just(0) | st.integers(0, 8),
    seed=st.integers(0, 5),
    prompt_logprobs=st.none() | st.just(0),
    logprobs=st.none() | st.just(0),
    ignore_eos=st.booleans(),
    stop_token_ids=st.lists(st.integers(0, VOCABULARY - 1), max_size=2).map(tuple),
)


class Traffic(RuleBasedStateMachine):
    """Requests join and leave at any moment, also while a step runs; a step may fail for one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = scheduler_of(num_pages=24, max_model_len=MAX_LENGTH, max_queue=9)
        self.model, self.ledger = PaperModel(2), Ledger()
        self.requests: dict[str, Request] = {}
        self.news: dict[str, News] = {}
        self.aborted: set[str] = set()
        self.failed: set[str] = set()
        self.in_flight: Scheduled | None = None

    @rule(prompt=PROMPTS, params=PARAMS, copies=st.integers(1, 3))
    def add(self, prompt, params, copies) -> None:
        for _ in range(copies):
            request = Request(f"r{len(self.requests)}", prompt, params)
            if self.scheduler.stats().num_waiting >= 9:
                with pytest.raises(QueueFullError):
                    self.scheduler.add(request)
                return
            self.scheduler.add(request)
            self.requests[request.id] = request
            self.news[request.id] = News()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.requests)))
        is_alive = self.news[request_id].finish is None and request_id not in self.aborted
        assert self.scheduler.abort(request_id) == is_alive
        if is_alive:
            self.aborted.add(request_id)

    @precondition(lambda self: self.in_flight is None)
    @rule()
    def plan(self) -> None:
        self.in_flight = self.scheduler.plan()
        assert (self.in_flight is None) == (not self.scheduler.has_work)
        if self.in_flight is not None:
            assert self.in_flight.step.num_tokens <= 12
            assert len({progress.request.id for progress in self.in_flight.pieces}) <= 4
            half_read = [progress for progress in self.scheduler._batch.running if progress.computed < progress.length]
            assert len(half_read) <= 1 and half_read == self.scheduler._batch.running[-1:][: len(half_read)]
            self.ledger.enter(self.in_flight, self.scheduler.chunk)

    @precondition(lambda self: self.in_flight is not None)
    @rule(fail=st.integers(0, 12))
    def settle(self, fail=12) -> None:
        assert self.in_flight is not None
        sampled = self.model.run(self.in_flight)
        if fail < len(sampled):
            row = self.in_flight.rows[fail]
            sampled[fail] = Sampled(error="not a number")
            self.failed |= {row.request_id} - self.aborted
        for output in self.scheduler.settle(self.in_flight, sampled):
            assert output.request_id not in self.aborted
            self.news[output.request_id].hear(output)
        self.in_flight = None

    @invariant()
    def pages_are_right(self) -> None:
        check_pages(self.scheduler)

    def teardown(self) -> None:
        for _ in range(2000):
            if self.in_flight is not None or self.scheduler.has_work:
                self.plan() if self.in_flight is None else self.settle()
                check_pages(self.scheduler)
        assert not self.scheduler.has_work, "the requests do not end"
        stats = self.scheduler.stats()
        assert stats.free_pages == stats.num_pages and stats.num_running == stats.num_waiting == 0
        assert self.ledger.restarts <= stats.num_preemptions
        for request_id, news in self.news.items():
            tokens, finish, of_prompt = answer_alone(self.requests[request_id], self.scheduler.chunk, MAX_LENGTH)
            if request_id in self.aborted:
                assert news.finish is None and news.tokens == tokens[: len(news.tokens)]
            elif request_id in self.failed:
                assert news.finish is Finish.ERROR and news.tokens == tokens[: len(news.tokens)]
            else:
                assert (news.tokens, news.finish) == (tokens, finish)
                asked = self.requests[request_id].params.prompt_logprobs is not None
                assert news.prompt_logprobs == (tuple(of_prompt) if asked else None)


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)


def random_request(rng: random.Random, request_id: str, longest: int) -> Request:
    """A request that often begins like another."""
    begin = [rng.randrange(3)] * rng.choice((0, 4, 13, 30))
    prompt = (*begin, *(rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 12))))[:longest]
    most = rng.choice((None, 1, 5, 20))
    return Request(
        request_id,
        prompt,
        SamplingParams(
            max_tokens=most,
            min_tokens=rng.choice((0, 0, 1)),
            seed=rng.randrange(9),
            ignore_eos=rng.random() < 0.7,
            prompt_logprobs=rng.choice((None, None, None, 0)),
        ),
    )


@given(
    seed=st.integers(0, 2**32),
    page_size=st.integers(1, 5),
    max_batch=st.integers(1, 9),
    max_step_tokens=st.integers(5, 40),
    spare_pages=st.integers(0, 20),
    share=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_engine_gives_the_answers_of_requests_alone(
    seed, page_size, max_batch, max_step_tokens, spare_pages, share
) -> None:
    rng = random.Random(seed)
    scheduler = scheduler_of(
        num_pages=-(-MAX_LENGTH // page_size) + spare_pages, max_model_len=MAX_LENGTH, page_size=page_size,
        max_batch=max_batch, max_step_tokens=max_step_tokens, prefix_cache=share,
    )  # fmt: skip
    requests = [random_request(rng, f"{i}", MAX_LENGTH - 1) for i in range(25)]
    model, news, later = PaperModel(page_size), {request.id: News() for request in requests}, list(requests)
    for _ in range(5000):
        for _ in range(min(len(later), rng.randrange(4))):
            scheduler.add(later.pop(0))
        if (scheduled := scheduler.plan()) is not None:
            for output in scheduler.settle(scheduled, model.run(scheduled)):
                news[output.request_id].hear(output)
        if not later and not scheduler.has_work:
            break
    for request in requests:
        tokens, finish, _ = answer_alone(request, scheduler.chunk, MAX_LENGTH)
        assert (news[request.id].tokens, news[request.id].finish) == (tokens, finish)
    assert scheduler.stats().free_pages == scheduler.stats().num_pages


def test_ten_thousand_requests_leave_nothing_behind() -> None:
    rng = random.Random(7)
    scheduler = scheduler_of(num_pages=40, max_model_len=MAX_LENGTH, max_batch=12, max_step_tokens=20, page_size=4)
    model, finished, aborted, num = PaperModel(4), 0, 0, 10_000
    added = 0
    while (added < num or scheduler.has_work) and scheduler.stats().num_steps < 5 * num:
        while added < num and scheduler.stats().num_waiting < 20:
            scheduler.add(random_request(rng, str(added), MAX_LENGTH - 1))
            added += 1
        scheduled = scheduler.plan()
        if rng.random() < 0.1:
            aborted += scheduler.abort(str(rng.randrange(max(0, added - 40), added)))
        assert scheduled is not None
        finished += sum(o.finish is not None for o in scheduler.settle(scheduled, model.run(scheduled)))
    assert finished + aborted == num
    stats = scheduler.stats()
    assert stats.free_pages == stats.num_pages == 40
    assert stats.num_preemptions > 100 and stats.prefix_hits > 10_000 and aborted > 100
    assert not scheduler._requests and not scheduler._batch.running and not scheduler._batch.waiting
    table = scheduler._batch.pages
    assert len(table._key_of) == len(table._page_of) == table.num_cached <= 40
