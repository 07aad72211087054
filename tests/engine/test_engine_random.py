"""Many random requests, which come, go and fail as they like: the engine goes on, and every page comes back."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from engine.models import write_model

from skymoe.base.errors import ConfigError
from skymoe.engine.config import EngineConfig
from skymoe.engine.engine import Engine
from skymoe.engine.output import Finish
from skymoe.engine.params import MIN_REPETITION, SamplingParams

VOCAB = 97


def random_params(draw: random.Random) -> SamplingParams:
    """Any that are valid, each field often at its default."""
    choices: dict[str, list[Any]] = dict(
        max_tokens=[1, 2, 7, 20, None],
        min_tokens=[1],
        temperature=[0, 0.01, 0.7, 100.0],
        top_k=[1, 5, 2**31 - 1],
        top_p=[1e-9, 0.5],
        min_p=[0.1, 1.0],
        presence_penalty=[-2, 2.0],
        frequency_penalty=[-2.0, 2],
        repetition_penalty=[MIN_REPETITION, 0.5, 10],
        seed=[0, 2**63 - 1],
        logit_bias=[{5: -100.0, 6: 100.0}, {token: -100 for token in range(96)}],
        logprobs=[0, 3, 20],
        prompt_logprobs=[0, 20],
        stop_token_ids=[(5, 6), tuple(range(60))],
        ignore_eos=[True],
    )
    chosen = {name: draw.choice(values) for name, values in choices.items() if draw.random() < 0.25}
    return SamplingParams(**chosen)


def random_prompt(draw: random.Random) -> tuple[int, ...]:
    size = draw.choice([1, 2, 5, 16, 33, 60, 79, 80, 200])
    if draw.random() < 0.3:
        return tuple(i % 90 for i in range(size))  # beginnings that many share
    return tuple(draw.randrange(VOCAB + (draw.random() < 0.01)) for _ in range(size))


def check_random(model: Path, count: int, *, seed: int) -> Counter[str]:
    draw, ended, refused = random.Random(seed), Counter[str](), 0
    config = EngineConfig(
        model=model, page_size=4, max_batch=8, max_step_tokens=24, max_queue=16, max_model_len=80, kv_memory_gb=4e-5
    )
    with Engine(config) as engine:
        assert engine.info.num_pages < 100  # little enough for preemptions
        running: set[str] = set()
        number = 0
        while number < count or engine.has_work:
            for _ in range(draw.randrange(4) if number < count else 0):
                try:
                    engine.add(str(number), random_prompt(draw), random_params(draw))
                    running.add(str(number))
                except ConfigError:
                    refused += 1
                number += 1
            if running and draw.random() < 0.1:
                name = draw.choice(sorted(running))
                assert engine.abort(name)
                running.remove(name)
                ended["abort"] += 1
            for output in engine.step():
                assert output.request_id in running
                assert output.token_id is None or 0 <= output.token_id < VOCAB
                if output.finish is not None:
                    running.remove(output.request_id)
                    ended[output.finish] += 1
        assert not running and ended.total() + refused == number
        stats = engine.stats()
        assert stats.free_pages == stats.num_pages and stats.num_running == stats.num_waiting == 0
        assert stats.num_preemptions > 0 and stats.prefix_hits > 0
    return ended


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("random") / "model", "mixtral")


def test_a_few_hundred(model: Path) -> None:
    ended = check_random(model, 250, seed=1)
    assert ended[Finish.STOP] > 3 and ended[Finish.LENGTH] > 10 and ended["abort"] > 5


@pytest.mark.slow
def test_ten_thousand(model: Path) -> None:
    ended = check_random(model, 10_000, seed=2)
    assert ended[Finish.STOP] > 100 and ended[Finish.LENGTH] > 100 and ended["abort"] > 100
