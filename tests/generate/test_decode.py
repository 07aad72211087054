from __future__ import annotations

import dataclasses

import pytest
import torch

from skymoe.base.errors import ConfigError, FormatError, SkymoeError
from skymoe.generate.decode import iter_tokens, token_budget
from skymoe.model.init import initialize
from skymoe.model.transformer import Transformer
from skymoe.spec.model import Architecture, GateNormSpec, ModelSpec, MoESpec, QkNorm

DENSE = ModelSpec(
    architecture=Architecture.LLAMA, vocab_size=61, hidden_size=30, num_layers=3, ffn_size=44, num_heads=3,
    num_kv_heads=1, head_dim=10, max_position=40, init_std=0.3,
)  # fmt: skip
MOE = MoESpec(num_experts=5, top_k=2, ffn_size=22, gate_norm=GateNormSpec(), shared_ffn_size=6)
SPECS = {
    "dense": DENSE,
    "tied, normed, biased": dataclasses.replace(DENSE, tie_embeddings=True, qk_norm=QkNorm.HEAD, qkv_bias=True),
    "sliding window": dataclasses.replace(DENSE, architecture=Architecture.MISTRAL, sliding_window=7),
    "moe": dataclasses.replace(DENSE, architecture=Architecture.SKYMOE, moe=MOE),
    "moe in some layers": dataclasses.replace(DENSE, architecture=Architecture.SKYMOE, moe=MOE, moe_layers=(0, 2)),
}
PROMPT = [3, 60, 0, 17, 9]


def build(spec: ModelSpec) -> Transformer:
    return initialize(Transformer(spec), seed=1).eval()


@pytest.mark.parametrize("name", SPECS)
def test_greedy_over_the_cache_is_greedy_without_one(name: str) -> None:
    model = build(SPECS[name])
    ids = list(PROMPT)
    with torch.inference_mode():
        for _ in range(20):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    found = list(iter_tokens(model, PROMPT, max_tokens=20, temperature=0))
    assert found == ids[len(PROMPT) :]
    assert len(set(found)) > 2  # a model that repeats one token would prove little


def test_a_seed_fixes_the_tokens() -> None:
    model = build(SPECS["moe"])
    draws = [
        list(iter_tokens(model, PROMPT, max_tokens=15, generator=torch.Generator().manual_seed(seed)))
        for seed in (5, 5, 6)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_it_ends_before_a_stop_token_and_at_the_end_of_the_context() -> None:
    model = build(DENSE)
    free = list(iter_tokens(model, PROMPT, max_tokens=1000, temperature=0))
    assert len(free) == DENSE.max_position - len(PROMPT)
    stop = free[6]
    assert list(iter_tokens(model, PROMPT, max_tokens=1000, temperature=0, stop_ids={stop})) == free[: free.index(stop)]


def test_the_last_place_of_the_context_can_be_used() -> None:
    assert token_budget(DENSE, 39, 10) == 1
    assert len(list(iter_tokens(build(DENSE), [1] * 39, max_tokens=10, temperature=0))) == 1


@pytest.mark.parametrize("prompt", [[], [1] * 40, [1] * 41])
def test_a_prompt_without_tokens_or_room_is_refused(prompt: list[int]) -> None:
    with pytest.raises(ConfigError):
        list(iter_tokens(build(DENSE), prompt, max_tokens=4))


@pytest.mark.parametrize("token", [61, -1])
def test_tokens_outside_the_vocabulary_are_refused(token: int) -> None:
    with pytest.raises(FormatError, match="vocabulary is 61"):
        list(iter_tokens(build(DENSE), [1, token], max_tokens=4))


def test_weights_with_nan_are_an_error_not_a_token() -> None:
    model = build(SPECS["dense"])
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    with pytest.raises(SkymoeError, match="not finite"):
        list(iter_tokens(model, PROMPT, max_tokens=2))


def test_bfloat16_runs_over_a_bfloat16_cache() -> None:
    model = build(SPECS["moe"]).bfloat16()
    assert len(list(iter_tokens(model, PROMPT, max_tokens=8))) == 8
