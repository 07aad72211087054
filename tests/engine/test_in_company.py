"""A request gets the same tokens and the same log-probabilities, to the last bit, alone and among others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine.greedy import prompts
from engine.models import write_model

from skymoe.engine.llm import LLM
from skymoe.engine.params import SamplingParams

SMALL: dict[str, Any] = dict(max_batch=6, max_step_tokens=14, page_size=4, max_model_len=96)
NUM_PAGES = 24
NUM_REQUESTS = 9


@pytest.mark.parametrize(("family", "dtype"), [("mixtral", "bfloat16"), ("skymoe", "float32")])
def test_drawn_tokens_and_logprobs_are_equal_to_the_last_bit(tmp_path: Path, family: str, dtype: str) -> None:
    path = write_model(tmp_path / family, family)
    asked = prompts(NUM_REQUESTS)
    params = [
        SamplingParams(
            max_tokens=16, temperature=1.3, seed=seed, logprobs=3, ignore_eos=True,
            prompt_logprobs=2 if seed % 5 == 0 else None,
        )
        for seed in range(NUM_REQUESTS)
    ]  # fmt: skip
    with LLM(path, **SMALL, dtype=dtype, kv_memory_gb=0.01) as llm:
        alone = [llm.generate([prompt], [own])[0] for prompt, own in zip(asked, params, strict=True)]
        gb_per_page = 0.01 / llm.info.num_pages
    with LLM(path, **SMALL, dtype=dtype, kv_memory_gb=gb_per_page * (NUM_PAGES + 0.5)) as llm:
        assert llm.info.num_pages == NUM_PAGES
        together = llm.generate(asked, params)
        stats = llm.stats()
    assert stats.num_preemptions > 0 and stats.prefix_hits > 0 and stats.free_pages == NUM_PAGES
    for one, other in zip(alone, together, strict=True):
        assert one.prompt_logprobs == other.prompt_logprobs
        assert one.outputs == other.outputs
