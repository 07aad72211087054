"""Routers that know the parent's hidden states: one cluster of them per expert.

The parent reads a text, layer by layer; what enters each feed-forward is clustered by k-means on the sphere (cosine
similarity; Dhillon and Modha 2001), because a gate compares directions: its logit is a scalar product. Each centroid
becomes a row of the router, as long as a normal row would be. So tokens of a kind go to the same expert from the start.

The choice of the first centroids is seeded; the hidden states are matrix products, which other processors round
otherwise, so this is the one initialization that need not be the same to the last bit elsewhere.

Shapes: T tokens, D hidden size, C clusters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from skymoe.base.errors import ConfigError, FormatError
from skymoe.convert.streamed import router_inputs
from skymoe.data.tokenizer import load_tokenizer
from skymoe.ops.reproducible import uniform

_SEQUENCE = 512  # tokens that see one another
_ROUNDS = 50
_MAX_TEXT_BYTES = 1 << 26


def text_tokens(directory: Path, text: Path, count: int, vocab_size: int) -> Tensor:
    """The first `count` tokens of the file `text` as sequences (B, T), by the tokenizer of the model in `directory`.

    Raises:
        FormatError: no tokenizer.json, or one of another model. ConfigError: no such text, or next to nothing in it.
        MissingExtraError: the package `tokenizers` is not installed.
    """
    try:
        with text.open("rb") as file:
            words = file.read(_MAX_TEXT_BYTES).decode("utf-8", errors="ignore")
    except OSError as error:
        raise ConfigError(f"the text cannot be read: {error.strerror}", where=text) from error
    ids = load_tokenizer(directory).encode(words[: 16 * count])[:count]
    if ids and max(ids) >= vocab_size:
        what = f"the tokenizer gives token {max(ids)}, the model has {vocab_size}"
        raise FormatError(what, where=directory / "tokenizer.json")
    length = min(_SEQUENCE, len(ids))
    if length < 16:
        raise ConfigError(f"the text has {len(ids)} tokens", where=text, hint="some thousand are better")
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def tokens_hash(tokens_BT: Tensor) -> str:
    """SHA-256 of the tokens: what the text of a plan is known by."""
    return hashlib.sha256(tokens_BT.numpy().tobytes()).hexdigest()


def router_centroids(
    directory: Path, tokens_BT: Tensor, *, layers: Collection[int], clusters: int, seed: int
) -> dict[int, Tensor]:
    """For each of `layers`, `clusters` directions (C, D) of unit length, fp32.

    Raises:
        ConfigError: fewer tokens than clusters.
        FormatError: hidden states are NaN or infinite.
    """
    if tokens_BT.numel() < clusters:
        what = f"{tokens_BT.numel()} tokens cannot be put into {clusters} clusters"
        raise ConfigError(what, hint="a longer text, or more centroid_tokens")
    found = {}
    for layer, x_TD, _ in router_inputs(directory, tokens_BT):
        if layer not in layers:
            continue
        if not bool(torch.isfinite(x_TD).all()):
            what = f"the hidden states that enter the feed-forward of layer {layer} hold NaN or infinity"
            raise FormatError(what, where=directory, why="weights before it do, or are far too large")
        found[layer] = spherical_k_means(x_TD, clusters, f"{seed}/centroids/{layer}")
    return found


def spherical_k_means(x_TD: Tensor, clusters: int, key: str) -> Tensor:
    """Unit centroids (C, D) of the directions of `x_TD`: seeded k-means++, then Lloyd's rounds until nothing moves."""
    unit_TD = F.normalize(x_TD, dim=-1)
    centroids_CD = _spread(unit_TD, clusters, key)
    owner_T = torch.full((len(unit_TD),), -1)
    for _ in range(_ROUNDS):
        cosine_T, now_T = (unit_TD @ centroids_CD.T).max(-1)
        if torch.equal(now_T, owner_T):
            break
        owner_T = now_T
        sums_CD = torch.zeros_like(centroids_CD).index_add_(0, owner_T, unit_TD)
        lonely = (owner_T.bincount(minlength=clusters) == 0).nonzero()[:, 0]
        sums_CD[lonely] = unit_TD[cosine_T.argsort()[: len(lonely)]]  # an empty cluster starts at the worst served
        centroids_CD = F.normalize(sums_CD, dim=-1)
    return centroids_CD


def _spread(unit_TD: Tensor, clusters: int, key: str) -> Tensor:
    """First centroids: each next one a token, the likelier the farther it is from those before."""
    draws_C = (uniform((clusters,), 1.0, key).double() + 1) / 2
    chosen = [int(draws_C[0] * len(unit_TD)) % len(unit_TD)]
    distance_T = (1 - unit_TD @ unit_TD[chosen[0]]).clamp(min=0).double()
    for draw in draws_C[1:]:
        reach_T = (distance_T + 1e-12).cumsum(0)
        chosen.append(min(int((reach_T < draw * reach_T[-1]).sum()), len(unit_TD) - 1))
        distance_T = torch.minimum(distance_T, (1 - unit_TD @ unit_TD[chosen[-1]]).clamp(min=0).double())
    return unit_TD[torch.tensor(chosen)]
