"""What the scheduler promises, one promise at a time. Random traffic is in test_scheduler_random.py."""

from __future__ import annotations

from typing import Any

import pytest
from engine.paper_model import EOS, VOCABULARY, PaperModel, answer_alone, scheduler_of
from hypothesis import given
from hypothesis import strategies as st

from skymoe.base.errors import ConfigError
from skymoe.engine.admission import QueueFullError
from skymoe.engine.output import Finish, TokenOutput
from skymoe.engine.params import SamplingParams
from skymoe.engine.request import Request, Sampled
from skymoe.engine.scheduler import Scheduler
from skymoe.engine.step_builder import MAX_PROMPT_ROWS, Scheduled


def request(request_id: str, prompt: tuple[int, ...] | int, **params: Any) -> Request:
    """A request of so many tokens, or of these."""
    tokens = tuple(i * 7 % VOCABULARY for i in range(prompt)) if isinstance(prompt, int) else prompt
    return Request(request_id, tokens, SamplingParams(**{"seed": 1, "ignore_eos": True, **params}))


def shape(scheduled: Scheduled | None) -> list[tuple[str, int, int, int]]:
    """Who, from, to, and rows of logits, of each chunk."""
    assert scheduled is not None
    pairs = zip(scheduled.pieces, scheduled.step.chunks, strict=True)
    return [(piece.request.id, chunk.start, chunk.end, chunk.num_logits) for piece, chunk in pairs]


def settle(scheduler: Scheduler, scheduled: Scheduled | None, token: int = 9) -> list[TokenOutput]:
    """Everybody draws the same."""
    assert scheduled is not None
    return scheduler.settle(scheduled, [Sampled(token) for _ in scheduled.rows])


def run(scheduler: Scheduler, model: PaperModel) -> dict[str, list[TokenOutput]]:
    """Runs until nobody is left; the news, in the order in which they ended."""
    news: dict[str, list[TokenOutput]] = {}
    for _ in range(10_000):
        if (scheduled := scheduler.plan()) is None:
            return news
        for output in scheduler.settle(scheduled, model.run(scheduled)):
            news.setdefault(output.request_id, []).append(output)
            if output.finish is not None:
                news[output.request_id] = news.pop(output.request_id)
    raise AssertionError("the requests do not end")


def test_those_who_decode_come_first_then_prompts_in_the_order_of_arrival_as_far_as_the_step_takes() -> None:
    scheduler = scheduler_of()  # pieces of 8, steps of 12
    scheduler.add(request("a", 3))
    scheduler.add(request("b", (1,) * 17))
    assert shape(scheduler.plan()) == [("a", 0, 3, 1), ("b", 0, 8, 0)]
    settle(scheduler, scheduler._in_flight)
    scheduler.add(request("c", (2, 2)))
    assert shape(scheduler.plan()) == [("a", 3, 4, 1), ("b", 8, 16, 0), ("b", 16, 17, 1), ("c", 0, 2, 1)]
    settle(scheduler, scheduler._in_flight)
    assert shape(scheduler.plan()) == [("a", 4, 5, 1), ("b", 17, 18, 1), ("c", 2, 3, 1)]


def test_nobody_takes_pages_who_finds_no_room_in_the_step() -> None:
    scheduler = scheduler_of()
    for name, size in {"a": 12, "b": 1}.items():
        scheduler.add(request(name, size))
    assert shape(scheduler.plan()) == [("a", 0, 8, 0), ("a", 8, 12, 1)]
    assert scheduler.stats().num_waiting == 1 and scheduler.stats().free_pages == 1000 - 6


def test_no_more_than_the_batch_and_the_others_wait() -> None:
    scheduler = scheduler_of(max_batch=2)
    for name in "abc":
        scheduler.add(request(name, (int(name, 16),), max_tokens=2))
    assert [who for who, *_ in shape(scheduler.plan())] == ["a", "b"]
    assert (scheduler.stats().num_running, scheduler.stats().num_waiting) == (2, 1)
    settle(scheduler, scheduler._in_flight)
    scheduler.abort("a")
    assert [who for who, *_ in shape(scheduler.plan())] == ["b", "c"]


@given(
    length=st.integers(1, 59),
    others=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 59), st.booleans()), max_size=6),
    num_pages=st.integers(30, 60),
)
def test_the_pieces_of_a_prompt_depend_on_the_prompt_alone(length, others, num_pages) -> None:
    """In any company, whether it is stopped or not, its beginning in the cache or not."""
    scheduler = scheduler_of(num_pages=num_pages)
    comers = [(at, request(f"{i}", size if same else (1,) * size)) for i, (at, size, same) in enumerate(others)]
    seen: set[tuple[int, int]] = set()
    for now in range(2000):
        for _, comer in filter(lambda pair: pair[0] == now, [(2, request("mine", length)), *comers]):
            scheduler.add(comer)
        if (scheduled := scheduler.plan()) is not None:
            seen |= {(start, end) for who, start, end, _ in shape(scheduled) if who == "mine"}
            settle(scheduler, scheduled)
        elif now > 5:
            break
    assert not scheduler.has_work
    pieces = {(start, min(start + 8, length)) for start in range(0, length, 8)}
    of_prompt = {(start, end) for start, end in seen if start < length}
    assert of_prompt <= pieces and max(pieces) in of_prompt
    assert all(end == start + 1 for start, end in seen - of_prompt)


@pytest.mark.parametrize(
    ("fields", "chunk", "running"),
    [
        ({"page_size": 16, "max_batch": 64, "max_step_tokens": 512}, 128, 64),
        ({"page_size": 48, "max_batch": 64, "max_step_tokens": 512}, 96, 64),
        ({"page_size": 16, "max_batch": 64, "max_step_tokens": 100}, 48, 53),
        ({"page_size": 16, "max_batch": 4, "max_step_tokens": 16}, 16, 1),
        ({"page_size": 16, "max_batch": 4096, "max_step_tokens": 512}, 128, 385),
        ({"page_size": 256, "max_batch": 64, "max_step_tokens": 300}, 256, 45),
        ({"page_size": 1, "max_batch": 1, "max_step_tokens": 1}, 1, 1),
    ],
)
def test_a_piece_is_whole_pages_and_fits_beside_a_full_batch(fields, chunk, running) -> None:
    scheduler = scheduler_of(**fields)
    assert (scheduler.chunk, scheduler.max_running) == (chunk, running)


def test_a_prompt_is_read_on_in_every_step_however_many_decode() -> None:
    scheduler = scheduler_of(max_batch=100, max_step_tokens=12)
    assert (scheduler.chunk, scheduler.max_running) == (6, 7)
    for number in range(6):
        scheduler.add(request(f"{number}", (number,), max_tokens=60))
    for name in ("long", "next"):
        scheduler.add(request(name, 50))
    for start in range(0, 50, 6):
        scheduled = scheduler.plan()
        assert ("long", start, min(start + 6, 50), int(start == 48)) in shape(scheduled)
        settle(scheduler, scheduled)
    assert scheduler.stats().num_running == 7 and scheduler.stats().num_waiting == 1


def test_a_step_smaller_than_a_page_is_refused() -> None:
    with pytest.raises(ConfigError, match="smaller than a page"):
        scheduler_of(page_size=16, max_step_tokens=15)


def test_a_beginning_is_read_from_the_cache_in_whole_pieces_and_the_last_piece_is_computed() -> None:
    scheduler = scheduler_of(max_step_tokens=40, max_batch=24)
    assert scheduler.chunk == 20
    prompt = tuple(range(20)) + (1,) * 20
    news = []
    for name, tokens in {"a": prompt, "b": prompt, "c": (*prompt, 5), "d": (*prompt[:39], 6)}.items():
        scheduler.add(request(name, tokens, max_tokens=1))
        news += run(scheduler, PaperModel(2))[name] if name == "a" else settle(scheduler, scheduler.plan())
    assert [output.num_cached_tokens for output in news] == [0, 20, 40, 20]
    stats = scheduler.stats()
    assert (stats.prefix_queries, stats.prefix_hits, stats.prompt_tokens) == (161, 80, 161)


def test_equal_prompts_that_come_together_are_computed_once() -> None:
    scheduler = scheduler_of(max_step_tokens=40, max_batch=4, page_size=4)
    prompt = tuple(i % VOCABULARY for i in range(45))
    assert scheduler.chunk == 36
    for name in "abc":
        scheduler.add(request(name, prompt, seed=1, max_tokens=3))
    first = scheduler.plan()
    assert shape(first) == [("a", 0, 36, 0)]
    settle(scheduler, first)
    second = scheduler.plan()
    assert shape(second) == [("a", 36, 45, 1), ("b", 36, 45, 1), ("c", 36, 45, 1)]
    assert second is not None
    assert len({chunk.pages[:9] for chunk in second.step.chunks}) == 1
    assert len({page for chunk in second.step.chunks for page in chunk.pages[9:]}) == 9


def test_pages_written_in_a_step_can_be_read_in_the_same_step() -> None:
    scheduler, model = scheduler_of(max_step_tokens=12, max_batch=6), PaperModel(2)
    prompt = (1, 2, 3, 4, 5, 6, 7)
    requests = [request(name, prompt, max_tokens=3, seed=seed) for seed, name in enumerate("ab")]
    for one in requests:
        scheduler.add(one)
    first = scheduler.plan()
    assert first is not None and shape(first) == [("a", 0, 6, 0), ("a", 6, 7, 1), ("b", 6, 7, 1)]
    news = {output.request_id: [output] for output in scheduler.settle(first, model.run(first))}
    for name, outputs in run(scheduler, model).items():
        news[name] += outputs
    for one in requests:
        assert [output.token_id for output in news[one.id]] == answer_alone(one, scheduler.chunk, 100)[0]


def test_without_the_prefix_cache_nothing_is_looked_up() -> None:
    scheduler = scheduler_of(prefix_cache=False)
    for name in "ab":
        scheduler.add(request(name, 30, max_tokens=1))
    run(scheduler, PaperModel(2))
    stats = scheduler.stats()
    assert (stats.prefix_queries, stats.prefix_hits, stats.cached_pages) == (0, 0, 0)


def test_the_last_to_arrive_makes_room_and_goes_on_where_it_was() -> None:
    scheduler, model = scheduler_of(num_pages=20), PaperModel(2)
    requests = [request(name, size, max_tokens=20, seed=size) for name, size in zip("abc", (9, 10, 11), strict=True)]
    for one in requests:
        scheduler.add(one)
    news = run(scheduler, model)
    assert scheduler.stats().num_preemptions > 0 and list(news) == ["a", "b", "c"]
    for one in requests:
        assert [output.token_id for output in news[one.id]] == answer_alone(one, scheduler.chunk, 40)[0]
        assert [output.num_cached_tokens is None for output in news[one.id]] == [False] + [True] * 19
    assert scheduler.stats().generation_tokens == 60 and scheduler.stats().prompt_tokens == 30
    assert scheduler.stats().prefix_queries == 30  # not again when they go on


def test_a_request_that_fills_the_whole_cache_ends_among_others() -> None:
    scheduler = scheduler_of(num_pages=10, max_model_len=1000)
    assert scheduler.max_model_len == 20
    for name in "abcd":
        scheduler.add(request(name, 7, max_tokens=None))
    news = run(scheduler, PaperModel(2))
    assert {name: len(outputs) for name, outputs in news.items()} == dict.fromkeys("abcd", 13)


def test_a_new_request_is_not_let_in_only_to_be_stopped() -> None:
    scheduler = scheduler_of(num_pages=4)
    for name in "ab":
        scheduler.add(request(name, (int(name, 16),) * 4, max_tokens=3))
    assert [who for who, *_ in shape(scheduler.plan())] == ["a"]  # two pages are free, but then none would be left


@pytest.mark.parametrize(
    ("params", "tokens", "finish"),
    [
        ({"max_tokens": 3}, 3, Finish.LENGTH),
        ({"max_tokens": None}, 95, Finish.LENGTH),
        ({"max_tokens": 500}, 95, Finish.LENGTH),
        ({"stop_token_ids": (9,), "max_tokens": 3}, 1, Finish.STOP),
        ({"stop_token_ids": (9,), "max_tokens": 1}, 1, Finish.STOP),
        ({"stop_token_ids": (9,), "min_tokens": 2, "max_tokens": 9}, 3, Finish.STOP),
    ],
)
def test_how_a_request_ends(params, tokens, finish) -> None:
    scheduler = scheduler_of()
    scheduler.add(request("a", 5, **params))
    outputs = []
    while scheduler.has_work:
        outputs += settle(scheduler, scheduler.plan())
    assert len(outputs) == tokens
    assert [output.finish for output in outputs] == [None] * (tokens - 1) + [finish]


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_an_end_of_text_token_ends_unless_it_is_ignored(ignore_eos) -> None:
    scheduler = scheduler_of()
    scheduler.add(request("a", 5, ignore_eos=ignore_eos, min_tokens=1))
    first = scheduler.plan()
    assert first is not None and first.rows[0].banned == (() if ignore_eos else EOS)
    settle(scheduler, first)
    second = scheduler.plan()
    assert second is not None and (second.rows[0].banned, second.rows[0].num_drawn) == ((), 1)
    assert settle(scheduler, second, EOS[1])[0].finish == (None if ignore_eos else Finish.STOP)


def test_prompt_logprobs_come_once_with_the_first_token_and_never_from_the_cache() -> None:
    scheduler, model = scheduler_of(), PaperModel(2)
    one = request("a", 21, max_tokens=2)
    scheduler.add(one)
    run(scheduler, model)
    asked = Request("b", one.prompt, SamplingParams(max_tokens=2, seed=1, ignore_eos=True, prompt_logprobs=0))
    scheduler.add(asked)
    first = scheduler.plan()
    assert first is not None and shape(first) == [("b", 0, 8, 8)]
    assert [row.target for row in first.rows] == list(one.prompt[1:9])
    assert scheduler.settle(first, model.run(first)) == []
    outputs = run(scheduler, model)["b"]
    _, _, expected = answer_alone(asked, scheduler.chunk, 100)
    assert outputs[0].prompt_logprobs == tuple(expected) and outputs[1].prompt_logprobs is None
    assert outputs[0].num_cached_tokens == 0 and outputs[0].token_id is not None


def test_the_prompt_of_one_token_has_no_log_probabilities() -> None:
    scheduler = scheduler_of()
    scheduler.add(request("a", 1, prompt_logprobs=3))
    assert settle(scheduler, scheduler.plan())[0].prompt_logprobs == ()


def test_rows_of_prompts_are_bounded_in_a_step() -> None:
    scheduler = scheduler_of(num_pages=500, max_model_len=2000, page_size=8, max_step_tokens=2000, max_batch=4)
    scheduler.add(request("a", 1000, prompt_logprobs=0))
    scheduled = scheduler.plan()
    assert scheduled is not None and scheduled.step.num_logits == MAX_PROMPT_ROWS == 2 * scheduler.chunk
    settled = [Sampled(logprobs=answer.logprobs) for answer in PaperModel(8).run(scheduled)]
    assert scheduler.settle(scheduled, settled) == []


def test_an_error_ends_its_request_alone_and_what_it_computed_is_not_shared() -> None:
    scheduler = scheduler_of(max_step_tokens=40)
    for name, prompt in {"a": 38, "b": (1,)}.items():
        scheduler.add(request(name, prompt))
    scheduled = scheduler.plan()
    assert scheduled is not None
    outputs = scheduler.settle(scheduled, [Sampled(error="not a number"), Sampled(4)])
    assert [(o.request_id, o.finish, o.token_id, o.error) for o in outputs] == [
        ("a", Finish.ERROR, None, "not a number"),
        ("b", None, 4, ""),
    ]
    assert scheduler.stats().cached_pages == 0
    scheduler.add(request("a", 38))
    assert shape(scheduler.plan())[1][:2] == ("a", 0)


def test_abort_frees_pages_at_once_in_the_queue_between_steps_and_while_one_runs() -> None:
    scheduler, model = scheduler_of(num_pages=30, max_batch=2), PaperModel(2)
    for name in "abc":
        scheduler.add(request(name, 8, max_tokens=50))
    scheduled = scheduler.plan()
    assert scheduled is not None
    assert scheduler.abort("c") and not scheduler.abort("c")
    assert scheduler.abort("a") and scheduler.abort("b")
    assert scheduler.stats().free_pages == 30 and not scheduler.has_work
    scheduler.add(request("a", 3, max_tokens=2))  # the id is free again: the step that runs is not about this one
    assert scheduler.settle(scheduled, model.run(scheduled)) == []
    again = request("a", 3, max_tokens=2)
    tokens, _, _ = answer_alone(again, scheduler.chunk, 100)
    assert [output.token_id for output in run(scheduler, model)["a"]] == tokens
    assert not scheduler.abort("nobody")


def test_the_queue_is_bounded() -> None:
    scheduler = scheduler_of(max_queue=2)
    for name in "ab":
        scheduler.add(request(name, 3))
    with pytest.raises(QueueFullError, match="2 requests wait"):
        scheduler.add(request("c", 3))
    settle(scheduler, scheduler.plan())
    scheduler.add(request("c", 3))
    assert scheduler.stats().num_waiting == 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request("a", ()), "empty"),
        (request("a", 100), "100 tokens"),
        (request("", 3), "1 to 256 characters"),
        (request("x" * 257, 3), "1 to 256 characters"),
        (request("taken", 3), "being answered already"),
        (request("a", (1, VOCABULARY)), "the prompt has the token 23"),
        (request("a", (-1,)), "the prompt has the token -1"),
        (request("a", (True,)), "the prompt has the token True"),
        (request("a", (1.0,)), "the prompt has the token 1.0"),  # type: ignore[arg-type]
        (request("a", 3, logit_bias={VOCABULARY: 1.0}), "logit_bias has the token 23"),
        (request("a", 3, stop_token_ids=(VOCABULARY,)), "stop_token_ids has the token 23"),
    ],
)
def test_what_can_never_be_answered_is_refused_and_leaves_nothing(bad, message) -> None:
    scheduler = scheduler_of()
    scheduler.add(request("taken", 99))
    with pytest.raises(ConfigError, match=message):
        scheduler.add(bad)
    assert scheduler.stats().num_waiting == 1


def test_a_request_without_a_seed_gets_one_of_its_own() -> None:
    scheduler = scheduler_of()
    for name in "abc":
        scheduler.add(Request(name, (1,), SamplingParams()))
    scheduled = scheduler.plan()
    assert scheduled is not None
    seeds = {row.seed for row in scheduled.rows}
    settle(scheduler, scheduled)
    later = scheduler.plan()
    assert later is not None and {row.seed for row in later.rows} == seeds and len(seeds) == 3


def test_nothing_to_do_is_no_step() -> None:
    scheduler = scheduler_of()
    assert scheduler.plan() is None and not scheduler.has_work
