"""The load generator of benchmarks/serve.py: its figures, its randomness, and that it hides no failure."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from serve.servers import Running, make_model, server


def _import(name: str) -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


load = _import("serve_load")
comparison = _import("serve_compare")
SLO = load.Objective(first_s=1.0, per_token_s=0.1)
WHOLE = {"ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("load") / "fox")


@pytest.fixture(scope="module")
def running(model: Path) -> Iterator[Running]:
    with server(model, engine={"step_s": 0.01, "die": 299}, key="", limits={"waiting": 0}) as running:
        yield running


def made(*pieces: float, start: float = 0.0, wanted: int = 3, error: str = "") -> object:
    end = pieces[-1] if pieces else start + 0.01
    return load.Answer(wanted, start, end, list(pieces), len(pieces), 5, error)


def test_percentiles_are_those_of_numpy() -> None:
    generator = random.Random(0)
    for count in (1, 2, 3, 10, 101):
        values = [generator.gauss(0, 1) for _ in range(count)]
        for percent in (0, 1, 50, 90, 99, 100):
            assert load.percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), abs=1e-12)
    assert math.isnan(load.percentile([], 50))


def test_arrivals_are_poisson_and_come_from_the_seed() -> None:
    times = load.poisson_times(4.0, 20000, seed=3)
    assert times == load.poisson_times(4.0, 20000, seed=3) != load.poisson_times(4.0, 20000, seed=4)
    gaps = np.diff([0.0, *times])
    assert (
        gaps.min() > 0 and gaps.mean() == pytest.approx(0.25, rel=0.03) and gaps.std() == pytest.approx(0.25, rel=0.04)
    )
    per_second = np.bincount(np.array(times, dtype=int))[:-1]
    assert per_second.var() == pytest.approx(per_second.mean(), rel=0.08), "as many as they vary"


def test_lengths_have_the_mean_that_was_asked_for() -> None:
    assert load.draw_lengths(64, 3, mixed=False, seed=0) == [64] * 3
    mixed = load.draw_lengths(64, 5000, mixed=True, seed=1)
    assert mixed == load.draw_lengths(64, 5000, mixed=True, seed=1)
    assert min(mixed) == 16 and max(mixed) == 112 and np.mean(mixed) == pytest.approx(64, rel=0.03)
    assert set(load.draw_lengths(1, 50, mixed=True, seed=1)) == {1}


def test_texts_are_as_long_as_asked_and_share_no_beginning() -> None:
    texts = [load.make_text(n, seed=n, count=lambda text: len(text) // 3) for n in range(20, 120)]
    assert all(0 <= len(text) // 3 - n < 8 for n, text in zip(range(20, 120), texts, strict=True))
    assert len({text.split()[0] + text.split()[1] for text in texts}) == 100
    assert texts[5] == load.make_text(25, seed=25, count=lambda text: len(text) // 3)


def test_figures_of_known_answers() -> None:
    """Two good, of which one too slow; one failed after two tokens that count for nothing."""
    cut, refused = made(0.2, 0.3, error="EOFError: cut"), made(error="no")
    answers = [made(0.5, 0.6, 0.7), made(3.0, 3.1, 3.4, start=1.0), cut, refused]
    found = load.summarize(answers, SLO)
    assert (found["asked"], found["failed"], found["errors"]) == (4, 2, {"EOFError: cut": 1, "no": 1})
    assert found["output_tokens"] == 6 and found["seconds"] == 3.4 and found["prompt_tokens"] == 10
    assert found["output_tokens_per_s"] == pytest.approx(6 / 3.4)
    assert found["good_fraction"] == 0.25 and found["goodput_requests_per_s"] == pytest.approx(1 / 3.4)
    assert found["first_token_s"]["p50"] == pytest.approx(1.25)
    assert found["between_pieces_s"]["p50"] == pytest.approx(0.1)
    assert found["per_token_s"]["p99"] == pytest.approx(0.2 - 0.01 * 0.1)
    assert found["end_to_end_s"]["p90"] == pytest.approx(0.7 + 0.9 * 1.7)
    assert found["shorter_than_wanted"] == 0


def test_a_closed_loop_keeps_so_many_under_way(running: Running) -> None:
    questions = [load.Question("the quick brown fox " * (1 + at % 3), 10 + at % 5) for at in range(12)]
    answers = asyncio.run(load.closed_loop(running.url, questions, WHOLE, 3))
    assert [a.error for a in answers] == [""] * 12
    assert sorted(a.num_tokens for a in answers) == sorted(q.num_tokens for q in questions)
    marks = sorted([(a.start, 1) for a in answers] + [(a.end, -1) for a in answers])
    assert max(np.cumsum([step for _, step in marks])) == 3
    for answer in answers:
        assert answer.start < answer.pieces[0] <= answer.pieces[-1] <= answer.end and answer.prompt_tokens > 3


def test_an_open_loop_asks_when_it_is_due_and_counts_from_there(running: Running) -> None:
    questions = [load.Question("lazy dog", 40, due) for due in (0.0, 0.1, 0.1, 0.3)]
    begin = time.perf_counter()
    answers = asyncio.run(load.open_loop(running.url, questions, WHOLE))
    assert [round(a.start - answers[0].start, 9) for a in answers] == [0.0, 0.1, 0.1, 0.3]
    assert all(a.start >= begin and a.first_s > 0 and not a.error for a in answers)
    assert answers[1].start < answers[0].end, "nobody waits for another's answer"


def test_failures_are_named(model: Path, running: Running) -> None:
    """More at once than there are places; a question that is no question; an engine that dies; nobody there."""
    crowd = asyncio.run(load.closed_loop(running.url, [load.Question("dog", 30)] * 90, WHOLE, 90))
    found = load.summarize(crowd, SLO)
    assert found["failed"] == found["errors"]["ValueError: HTTP 429"] == 90 - 64 and found["output_tokens"] == 64 * 30
    bad = asyncio.run(load.closed_loop(running.url, [load.Question("", 5)], WHOLE, 1))
    assert bad[0].error == "ValueError: HTTP 400"
    with server(model, engine={"step_s": 0.05}, key="") as short:

        async def cut() -> list[object]:
            asking = asyncio.create_task(load.closed_loop(short.url, [load.Question("dog", 500)], WHOLE, 1))
            await asyncio.sleep(0.7)
            short.process.kill()
            return list(await asking)

        broken = asyncio.run(cut())[0]
        assert broken.error and load.summarize([broken], SLO)["output_tokens"] == 0  # type: ignore[attr-defined]
        gone = asyncio.run(load.closed_loop(short.url, [load.Question("dog", 5)], WHOLE, 1))[0]
        assert gone.error.startswith("Connection") and math.isnan(load.summarize([gone], SLO)["first_token_s"]["p50"])


def test_skymoe_can_lose_and_a_server_that_fails_is_compared_with_nobody() -> None:
    fast = load.summarize([made(0.1, 0.2, 0.3)], SLO)
    slow = load.summarize([made(0.2, 0.4, 0.6)], SLO)
    refusing = load.summarize([made(0.1, 0.2, 0.3), made(error="ValueError: HTTP 429")], SLO)
    nothing = load.summarize([made(error="ValueError: HTTP 429")], SLO)
    figures = comparison.compare({"skymoe": [slow, fast, slow], "other": [fast] * 3, "refusing": [refusing] * 3})
    assert figures["failed"] == {"skymoe": 0, "other": 0, "refusing": 3}
    assert figures["first_token_s p50"]["ratios"] == {"other": pytest.approx(2.0)}
    assert not any(won for figure in list(figures)[1:] for won in figures[figure]["wins"].values())
    assert "loses" in comparison.table(figures) and "wins" not in comparison.table(figures)
    won = comparison.compare({"skymoe": [fast], "other": [slow]})
    assert won["output_tokens_per_s"]["wins"] == won["end_to_end_s p99"]["wins"] == {"other": True}
    broken = comparison.compare({"skymoe": [nothing], "other": [slow]})
    assert broken["first_token_s p50"]["wins"] == {}
    assert json.loads(comparison.as_json(broken))["first_token_s p50"]["medians"]["skymoe"] is None
