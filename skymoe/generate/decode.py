"""The decoding loop: prompt in one pass, then one token at a time over the key/value cache.

One sequence, one device. Batches of requests, paging and speculation are the serving engine's business.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch

from skymoe.base.errors import ConfigError, FormatError
from skymoe.model.batch import KVCache
from skymoe.model.transformer import Transformer
from skymoe.ops.sample import sample
from skymoe.spec.model import ModelSpec


def iter_tokens(
    model: Transformer,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    stop_ids: Collection[int] = (),
) -> Iterator[int]:
    """Tokens that continue `prompt_ids`, one by one as they are drawn.

    Ends before a token of `stop_ids`, after `max_tokens`, or where the model's context is full.

    Args:
        model: on one device.
        prompt_ids: at least one token.
        max_tokens: the most tokens to draw.
        temperature, top_k, top_p: see `skymoe.ops.sample.sample`.
        generator: on the model's device.
        stop_ids: end-of-text tokens.

    Raises:
        ConfigError: the prompt is empty or fills the context.
        FormatError: the prompt has a token that the model does not know.
        SkymoeError: the logits are not finite.
    """
    room = token_budget(model.spec, len(prompt_ids), max_tokens)
    _check_ids(model.spec, prompt_ids)
    weight = model.embed.weight
    cache = KVCache(model.spec, 1, len(prompt_ids) + room, weight.dtype, weight.device)
    tokens_BT = torch.tensor([list(prompt_ids)], dtype=torch.int64, device=weight.device)
    for _ in range(room):
        with torch.inference_mode():
            hidden_BTD = model.hidden(tokens_BT, cache=cache).hidden_BTD
            logits_BV = model.logits(hidden_BTD[:, -1])
            ids_B = sample(logits_BV, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        token = int(ids_B)
        if token in stop_ids:
            return
        yield token
        tokens_BT = ids_B[:, None]


def token_budget(spec: ModelSpec, num_prompt_tokens: int, max_tokens: int) -> int:
    """How many tokens may follow the prompt: `max_tokens`, or what is left of the context.

    Raises:
        ConfigError: nothing may follow.
    """
    if num_prompt_tokens < 1:
        raise ConfigError("the prompt has no token to continue from")
    if num_prompt_tokens >= spec.max_position:
        raise ConfigError(
            f"the prompt has {num_prompt_tokens} tokens and the model's context is {spec.max_position}",
            hint=f"shorten the prompt to fewer than {spec.max_position} tokens",
        )
    return min(max_tokens, spec.max_position - num_prompt_tokens)


def _check_ids(spec: ModelSpec, prompt_ids: Sequence[int]) -> None:
    if max(prompt_ids) >= spec.vocab_size or min(prompt_ids) < 0:
        raise FormatError(
            f"the tokenizer gives token {max(prompt_ids)} and the model's vocabulary is {spec.vocab_size}",
            why="tokenizer.json belongs to another model",
        )
