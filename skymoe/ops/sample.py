"""Choose the next token from logits: temperature, min-p, top-k, top-p.

The order is the common one: logits / temperature -> drop what is less likely than min_p times the best -> keep the k
largest -> keep the smallest set whose probability reaches p -> draw. Everything happens in fp64 on the logits' device:
one row costs a pass or two more, and sums over 150,000 tokens keep their digits. Ties at a threshold are all kept by
top-k and cut in the order of their ids by top-p, so one seed gives one text.

A row's result does not depend on the other rows, to the last bit: totals come from `cumsum`, which goes along a row in
order, not from `sum`, which is divided among threads when there is only one row.

Shapes: B sequences, V vocabulary, K the most likely tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skymoe.base.errors import ConfigError, SkymoeError

NOT_FINITE = "the model's logits are not finite, so there is no next token"

_HEAD = 1024  # top-p looks at so many tokens first: sorting them costs a hundredth of sorting the vocabulary


def sample(
    logits_BV: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token per sequence.

    Args:
        logits_BV: raw logits of the last position, any float dtype. -inf forbids a token.
        temperature: 0 takes the most likely token (the lowest id among equals); 1 is the model's own distribution.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the fewest tokens whose probabilities sum to at least p; 1 keeps all.
        min_p: keep tokens at least this fraction as likely as the most likely one; 0 keeps all.
        generator: source of randomness; None is torch's global one.

    Returns:
        Token ids (B,) int64.

    Raises:
        SkymoeError: the logits hold a NaN or +inf, or forbid every token.
        ConfigError: an option outside its range.
    """
    check_options(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits_BV = logits_BV.float()
    best_B = logits_BV.amax(-1)  # a NaN anywhere in a row becomes its maximum
    if not bool(torch.isfinite(best_B).all()):
        raise SkymoeError(
            NOT_FINITE,
            why="weights or activations hold NaN or infinity",
            hint="load the model in float32; if that does not help, its weights are broken",
        )
    if temperature == 0:
        return logits_BV.argmax(-1)
    probs_BV = filtered_probabilities(logits_BV, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    return torch.multinomial(probs_BV, 1, generator=generator).squeeze(-1)


def filtered_probabilities(
    logits_BV: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """The distribution that `sample` draws from, (B, V) fp32, rows sum to 1. `temperature` must be positive."""
    weights_BV = filtered_weights(logits_BV, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    return (weights_BV / weights_BV.sum(-1, keepdim=True)).float()


def filtered_weights(
    logits_BV: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """The same before it is normalized, (B, V) fp64: 1 for the most likely token, 0 for those that are dropped."""
    logits_BV = logits_BV.float()
    weights_BV = logits_BV.double()
    weights_BV = weights_BV.sub_(weights_BV.amax(-1, keepdim=True))  # before the division: a tiny temperature is finite
    weights_BV = weights_BV.div_(temperature).exp_()
    if min_p > 0:
        weights_BV = weights_BV.masked_fill_(weights_BV < min_p, 0.0)
    if 0 < top_k < logits_BV.shape[-1]:
        threshold_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        weights_BV = weights_BV.masked_fill_(logits_BV < threshold_B1, 0.0)
    return _nucleus(logits_BV, weights_BV, top_p) if top_p < 1 else weights_BV


def best_first(values_BV: Tensor, count: int) -> Tensor:
    """Ids (B, count) of the largest values of each row, best first; the lowest id first, and kept, among equals."""
    values_BK, ids_BK = values_BV.topk(count, dim=-1)
    ids_BK = ids_BK.sort(-1).values
    order_BK = values_BV.gather(-1, ids_BK).sort(dim=-1, descending=True, stable=True).indices
    ids_BK = ids_BK.gather(-1, order_BK)
    has_more_B = (values_BV >= values_BK[:, -1:]).sum(-1) > count  # topk took any of the equals at the border
    for row in has_more_B.nonzero().flatten().tolist():
        least = values_BK[row, -1]
        better = ids_BK[row][values_BV[row].gather(0, ids_BK[row]) > least]
        equals = (values_BV[row] == least).nonzero().flatten()
        ids_BK[row] = torch.cat((better, equals[: count - better.numel()]))
    return ids_BK


def _nucleus(logits_BV: Tensor, weights_BV: Tensor, top_p: float) -> Tensor:
    """`weights_BV` without the tokens whose more likely ones have at least `top_p` of the mass already."""
    enough_B1 = weights_BV.cumsum(-1)[:, -1:] * top_p
    head = min(_HEAD, logits_BV.shape[-1])
    order_BK = best_first(logits_BV, head)  # by logits: exp can round two of them to one
    before_BK = weights_BV.gather(-1, order_BK).cumsum(-1)
    if head < logits_BV.shape[-1] and not bool((before_BK[:, -1:] >= enough_B1).all()):
        order_BK = logits_BV.sort(dim=-1, descending=True, stable=True).indices
        before_BK = weights_BV.gather(-1, order_BK).cumsum(-1)
    kept_BK = torch.ones_like(order_BK, dtype=torch.bool)  # the first always stays
    kept_BK[:, 1:] = before_BK[:, :-1] < enough_B1
    kept_BV = torch.zeros_like(weights_BV, dtype=torch.bool).scatter_(-1, order_BK, kept_BK)
    return weights_BV.masked_fill_(~kept_BV, 0.0)


def check_options(*, temperature: float, top_k: int, top_p: float, min_p: float = 0.0) -> None:
    """Raise ConfigError for a sampling option outside its range."""
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature must be a finite number >= 0, got {temperature}")
    if top_k < 0:
        raise ConfigError(f"top_k must be >= 0 (0 keeps every token), got {top_k}")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p must be in (0, 1], got {top_p}")
    if not 0 <= min_p <= 1:
        raise ConfigError(f"min_p must be in [0, 1], got {min_p}")
