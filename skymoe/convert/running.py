"""A softmax over a vocabulary that is seen a block at a time: log-sum-exp, loss, top token, divergence.

The sums are kept relative to the largest logit so far and rescaled when a larger one comes (the online softmax of
Milakov and Gimelshein, arXiv 1805.02867). In fp64, because a KL divergence is a small difference of large sums.

Shapes: N tokens that are looked at, C tokens of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


class RunningSoftmax:
    """What is known of softmax(logits) after some blocks of the vocabulary.

    Attributes:
        top_N: the likeliest token so far; the first of equals.
    """

    def __init__(self, targets_N: Tensor) -> None:
        """`targets_N`: the tokens whose probability is wanted; a negative one is never found."""
        self._targets_N = targets_N
        self._max_N = torch.full(targets_N.shape, float("-inf"), dtype=torch.float64)
        self._sum_N = torch.zeros_like(self._max_N)  # of exp(logit - max)
        self._pull_N = torch.zeros_like(self._max_N)  # of exp(logit - max) (logit - other)
        self._target_N = torch.zeros_like(self._max_N)
        self.top_N = torch.zeros_like(targets_N)

    def add(self, part: range, logits_NC: Tensor, *, other_NC: Tensor | None = None) -> None:
        """One block: which tokens of the vocabulary, their logits, and another model's for `kl`."""
        logits_NC = logits_NC.double()
        top_N, index_N = logits_NC.max(-1)
        self.top_N = torch.where(top_N > self._max_N, index_N + part.start, self.top_N)
        max_N = torch.maximum(self._max_N, top_N)
        keep_N, self._max_N = (self._max_N - max_N).exp(), max_N
        share_NC = (logits_NC - max_N[:, None]).exp()
        self._sum_N = self._sum_N * keep_N + share_NC.sum(-1)
        if other_NC is not None:
            self._pull_N = self._pull_N * keep_N + (share_NC * (logits_NC - other_NC)).sum(-1)
        here_N = (self._targets_N >= part.start) & (self._targets_N < part.stop)
        column_N = (self._targets_N - part.start).clamp(0, len(part) - 1)
        self._target_N = torch.where(here_N, logits_NC.gather(-1, column_N[:, None])[:, 0], self._target_N)

    def log_sum_exp(self) -> Tensor:
        """log of the sum over the vocabulary, (N,)."""
        return self._max_N + self._sum_N.log()

    def losses(self) -> Tensor:
        """-log p(target), (N,) nats; of no meaning for a target that was never found."""
        return self.log_sum_exp() - self._target_N

    def kl(self, other: RunningSoftmax) -> Tensor:
        """KL(self || other), (N,) nats: sum of p (log p - log q). `other`'s logits were given to `add`."""
        divergence_N = self._pull_N / self._sum_N - self.log_sum_exp() + other.log_sum_exp()
        return divergence_N.clamp(min=0)  # below 0 by rounding only
