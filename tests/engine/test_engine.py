"""The engine itself: its loop, its bulkheads, what it says of itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from engine.models import write_model
from torch import Tensor

from skymoe.base.errors import ConfigError, MachineError
from skymoe.engine.admission import QueueFullError
from skymoe.engine.config import EngineConfig
from skymoe.engine.engine import Engine
from skymoe.engine.output import Finish, TokenOutput
from skymoe.engine.params import SamplingParams
from skymoe.engine.request import Sampled, SampleRow

GREEDY = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("engine") / "model", "qwen3_moe")


@pytest.fixture
def engine(model: Path) -> Iterator[Engine]:
    with Engine(EngineConfig(model=model, page_size=4, max_batch=4, max_queue=4, max_model_len=60)) as engine:
        yield engine


def run(engine: Engine) -> dict[str, list[TokenOutput]]:
    news: dict[str, list[TokenOutput]] = {}
    while engine.has_work:
        for output in engine.step():
            news.setdefault(output.request_id, []).append(output)
    return news


def ids(outputs: Sequence[TokenOutput]) -> list[int | None]:
    return [output.token_id for output in outputs]


def test_what_it_says_of_itself(engine: Engine) -> None:
    info = engine.info
    assert (info.name, info.vocab_size, info.max_model_len, info.page_size) == ("model", 97, 60, 4)
    assert (info.eos_ids, info.bos_id, info.num_ranks, info.num_layers) == ((2,), 1, 1, 3)
    assert (info.num_experts, info.moe_layers, info.weights, info.kv_dtype) == (6, (0, 2), "fp32", "fp32")
    assert info.split["heads"] == (10,) and info.split["experts"] == (6,)
    engine.add("a", (5, 6, 7), GREEDY)
    run(engine)
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.generation_tokens, stats.num_steps) == (3, 5, 5)
    assert stats.step_seconds > 0 and stats.num_pages == info.num_pages == stats.free_pages
    tokens_run = 3 + 4  # the last token drawn is not run
    assert [sum(row) for row in stats.expert_tokens] == [2 * tokens_run] * 2  # top 2 in each of two layers


def test_requests_come_and_go_between_steps(engine: Engine) -> None:
    engine.add("a", (5, 6, 7), GREEDY)
    alone = run(engine)["a"]
    engine.add("b", (8,) * 30, SamplingParams(max_tokens=None, ignore_eos=True))
    assert engine.step()
    engine.add("a", (5, 6, 7), GREEDY)
    assert engine.abort("b") and not engine.abort("b") and not engine.abort("nobody")
    news = run(engine)
    assert news.keys() == {"a"} and ids(news["a"]) == ids(alone)
    assert engine.step() == [] and not engine.has_work
    assert engine.stats().free_pages == engine.info.num_pages


def test_what_can_never_be_answered_is_refused_when_it_comes(engine: Engine) -> None:
    for prompt, params in (
        ((), GREEDY), ((97,), GREEDY), ((-1,), GREEDY), ((5,) * 60, GREEDY),
        ((5,), SamplingParams(logit_bias={97: 1.0})), ((5,), SamplingParams(stop_token_ids=(97,))),
    ):  # fmt: skip
        for take in (lambda p=prompt, q=params: engine.add("x", p, q), lambda p=prompt, q=params: engine.check(p, q)):
            with pytest.raises(ConfigError):
                take()
    for i in range(4):
        engine.add(f"{i}", (5,), GREEDY)
    with pytest.raises(QueueFullError, match="queue is full"):
        engine.add("4", (5,), GREEDY)
    with pytest.raises(ConfigError, match="answered already"):
        engine.add("0", (5,), GREEDY)
    assert run(engine).keys() == {"0", "1", "2", "3"}


def test_a_row_that_breaks_the_sampler_ends_its_request_only(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.add("good", (5, 6), GREEDY)
    expected = ids(run(engine)["good"])
    sample = engine._sampler.sample

    def breaks(logits_RV: Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
        if any(row.request_id == "bad" and row.num_drawn == 2 for row in rows):
            raise IndexError("a defect")
        return sample(logits_RV, rows)

    monkeypatch.setattr(engine._sampler, "sample", breaks)
    engine.add("bad", (7, 8), GREEDY)
    engine.add("good", (5, 6), GREEDY)
    news = run(engine)
    assert ids(news["good"]) == expected and news["good"][-1].finish is Finish.LENGTH
    assert len(news["bad"]) == 3 and news["bad"][-1].finish is Finish.ERROR and "IndexError" in news["bad"][-1].error
    assert engine.stats().free_pages == engine.info.num_pages


def test_a_step_that_was_cut_off_is_the_last(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(step: object) -> Tensor:
        raise KeyboardInterrupt

    engine.add("a", (5, 6), GREEDY)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine._group, "run", interrupted)
        engine.step()
    assert engine.abort("a")
    with pytest.raises(MachineError, match="cut off"):
        engine.step()
    engine.close()
    engine.close()
