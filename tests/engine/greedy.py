"""Prompts, and what transformers answers to them."""

from __future__ import annotations

import random
from pathlib import Path

import torch

VOCAB = 97  # of `engine.models`


def prompts(count: int, *, seed: int = 0) -> list[tuple[int, ...]]:
    """Random prompts of 1 to 40 tokens, and among them some that begin alike."""
    draw = random.Random(seed)
    begin = [draw.randrange(3, VOCAB) for _ in range(24)]
    made = []
    for i in range(count):
        size = draw.randint(1, 16) if i % 5 else 40
        made.append(tuple((begin if i % 3 == 0 else []) + [draw.randrange(3, VOCAB) for _ in range(size)]))
    return made


def transformers_greedy(path: Path, asked: list[tuple[int, ...]], num_tokens: int) -> list[tuple[int, ...]]:
    """What `transformers.generate` writes after each prompt, alone, in fp32; no token ends a text."""
    from transformers import AutoModelForCausalLM

    import skymoe.integrations.transformers  # noqa: F401  knows model_type "skymoe"

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    answers = []
    for prompt in asked:
        with torch.no_grad():
            ids = model.generate(
                torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        answers.append(tuple(ids[0, len(prompt) :].tolist()))
    return answers
