"""Greedy tokens are those of `transformers.generate`, on the same files, whatever the engine does meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine.greedy import prompts, transformers_greedy
from engine.models import MODELS, write_model

from skymoe.engine.llm import LLM
from skymoe.engine.params import SamplingParams

pytest.importorskip("transformers")

MAIN = ["llama", "mixtral", "qwen3_moe", "skymoe"]
ALL = [name for name in MODELS if name != "skywork_moe"]  # a class that transformers does not have
NUM_TOKENS = 12
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
SMALL: dict[str, Any] = dict(max_batch=6, max_step_tokens=14, page_size=4)  # prompts are read in pieces of 8
FEW_PAGES = 22  # two sequences of thirteen pages do not fit


@pytest.fixture(scope="module")
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("parity") / request.param, request.param)


def greedy(llm: LLM, asked: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return [completion.outputs[0].token_ids for completion in llm.generate(asked, GREEDY)]


def few_pages(path: Path) -> dict[str, Any]:
    """Options for a cache that cannot hold what runs at once."""
    with LLM(path, **SMALL, kv_memory_gb=0.01) as llm:
        per_page = 0.01 / llm.info.num_pages
    return {**SMALL, "kv_memory_gb": per_page * (FEW_PAGES + 0.5), "max_model_len": 80}


def check_family(path: Path, count: int) -> None:
    asked = prompts(count)
    expected = transformers_greedy(path, asked, NUM_TOKENS)
    with LLM(path, **few_pages(path)) as llm:
        assert llm.info.num_pages == FEW_PAGES
        assert greedy(llm, asked) == expected
        stats = llm.stats()
        assert stats.num_preemptions > 0 and stats.prefix_hits > 0
        assert stats.free_pages == stats.num_pages
    with LLM(path) as llm:  # all at once, nothing in pieces
        assert greedy(llm, asked) == expected


@pytest.mark.parametrize("directory", MAIN, indirect=True)
def test_in_batches_in_pieces_with_shared_beginnings_and_preemption(directory: Path) -> None:
    check_family(directory, 12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "directory", [pytest.param(name, marks=() if name in MAIN else pytest.mark.nightly) for name in ALL], indirect=True
)
def test_a_hundred_prompts(directory: Path) -> None:
    check_family(directory, 100)


@pytest.mark.slow
@pytest.mark.parametrize("directory", MAIN, indirect=True)
@pytest.mark.parametrize("tp", [2, 3, 4])
def test_on_several_ranks(directory: Path, tp: int) -> None:
    if MODELS[directory.name].num_heads < tp:
        pytest.skip("fewer heads than ranks")
    asked = prompts(100)
    expected = transformers_greedy(directory, asked, NUM_TOKENS)
    with LLM(directory, **SMALL, kv_memory_gb=0.001, tp=tp) as llm:
        assert llm.info.num_ranks == tp
        assert greedy(llm, asked) == expected


@pytest.mark.parametrize("directory", ["mixtral"], indirect=True)
@pytest.mark.parametrize("split", [("heads=3,6,0", "ffn=11,6,3", "vocabulary=1,90,6")], ids=str)
def test_by_a_split_that_is_not_even(directory: Path, split: tuple[str, ...]) -> None:
    asked = prompts(6)
    expected = transformers_greedy(directory, asked, NUM_TOKENS)
    with LLM(directory, **SMALL, split=split) as llm:
        assert llm.info.num_ranks == 3
        assert greedy(llm, asked) == expected


@pytest.mark.slow
@pytest.mark.parametrize("directory", ["mixtral", "qwen3_moe"], indirect=True)
@pytest.mark.parametrize("split", [("weights=3,1,1", "experts=1,3,2"), ("weights=1,2,1,1",)], ids=str)
def test_by_capacity_and_by_whole_experts(directory: Path, split: tuple[str, ...]) -> None:
    asked = prompts(20)
    expected = transformers_greedy(directory, asked, NUM_TOKENS)
    with LLM(directory, **SMALL, split=split) as llm:
        assert greedy(llm, asked) == expected
