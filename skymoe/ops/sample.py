"""Choose the next token from logits: temperature, top-k, top-p.

The order is the common one: logits / temperature -> keep the k largest -> keep the smallest set whose probability
reaches p -> draw. Everything happens in fp32 on the logits' device. Ties at a threshold are all kept by top-k and cut
in a fixed order by top-p, so one seed gives one text.

Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skymoe.base.errors import ConfigError, SkymoeError


def sample(
    logits_BV: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token per sequence.

    Args:
        logits_BV: raw logits of the last position, any float dtype. -inf forbids a token.
        temperature: 0 takes the most likely token (the lowest id among equals); 1 is the model's own distribution.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the fewest tokens whose probabilities sum to at least p; 1 keeps all.
        generator: source of randomness; None is torch's global one.

    Returns:
        Token ids (B,) int64.

    Raises:
        SkymoeError: the logits hold a NaN or +inf, or forbid every token.
        ConfigError: an option outside its range.
    """
    check_options(temperature=temperature, top_k=top_k, top_p=top_p)
    logits_BV = logits_BV.float()
    best_B = logits_BV.amax(-1)  # a NaN anywhere in a row becomes its maximum
    if not bool(torch.isfinite(best_B).all()):
        raise SkymoeError(
            "the model's logits are not finite, so there is no next token",
            why="weights or activations hold NaN or infinity",
            hint="load the model in float32; if that does not help, its weights are broken",
        )
    if temperature == 0:
        return logits_BV.argmax(-1)
    probs_BV = filtered_probabilities(logits_BV, temperature=temperature, top_k=top_k, top_p=top_p)
    return torch.multinomial(probs_BV, 1, generator=generator).squeeze(-1)


def filtered_probabilities(logits_BV: Tensor, *, temperature: float, top_k: int, top_p: float) -> Tensor:
    """The distribution that `sample` draws from, (B, V) fp32, rows sum to 1. `temperature` must be positive."""
    shifted_BV = logits_BV.float() - logits_BV.float().amax(-1, keepdim=True)
    scaled_BV = shifted_BV / temperature  # shifted first, so that a tiny temperature stays finite
    if 0 < top_k < scaled_BV.shape[-1]:
        threshold_B1 = scaled_BV.topk(top_k, dim=-1).values[:, -1:]
        scaled_BV = scaled_BV.masked_fill(scaled_BV < threshold_B1, float("-inf"))
    probs_BV = scaled_BV.softmax(-1)
    if top_p < 1:
        order_BV = scaled_BV.sort(dim=-1, descending=True, stable=True).indices  # softmax can round two logits to one
        sorted_BV = probs_BV.gather(-1, order_BV)
        before_BV = sorted_BV.cumsum(-1) - sorted_BV  # mass of the more likely tokens; the first has 0 and always stays
        dropped_BV = torch.zeros_like(before_BV, dtype=torch.bool).scatter_(-1, order_BV, before_BV >= top_p)
        probs_BV = probs_BV.masked_fill(dropped_BV, 0.0)
        probs_BV = probs_BV / probs_BV.sum(-1, keepdim=True)
    return probs_BV


def check_options(*, temperature: float, top_k: int, top_p: float) -> None:
    """Raise ConfigError for a sampling option outside its range."""
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature must be a finite number >= 0, got {temperature}")
    if top_k < 0:
        raise ConfigError(f"top_k must be >= 0 (0 keeps every token), got {top_k}")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p must be in (0, 1], got {top_p}")
