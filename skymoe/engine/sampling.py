"""Logits -> tokens, for a batch in which every row wants something else.

Draw i of a request is a function of the row's logits, its own tokens and parameters, its seed and i: the random number
is Philox's, keyed by the seed and counted by i, and a row's distribution is computed as if it were alone. So a request
draws the same tokens whatever else is in the batch, and again after a preemption.

The draw inverts the distribution function: one uniform number u, then the first token at which the running sum of
weights (fp64, in the order of ids) passes u times their total. Rows that only take the most likely token share one
`argmax`; rows with equal options share their tensor operations, a few rows at a time so that fp64 copies stay small.

A row whose logits are not finite ends its own request with an error, and no other. Log-probabilities are those of the
model's own distribution, before penalties, bias, temperature and cuts.

Shapes: R rows of logits, B rows of a block, V vocabulary, N tokens.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from skymoe.engine.output import TokenLogprobs
from skymoe.engine.params import SamplingParams
from skymoe.engine.request import Sampled, SampleRow
from skymoe.ops.sample import NOT_FINITE, best_first, filtered_weights

_BLOCK_VALUES = 1 << 20  # of fp64 work at a time: 8 MiB per tensor
_LEAST_LOGPROB = -9999.0  # for minus infinity, which JSON cannot carry; vLLM's value
_STREAM = 0x736B796D6F65  # the second word of the key, so that nobody who shares a seed shares our numbers
_FORBIDDEN = "no token can be drawn here: penalties, logit_bias and min_tokens leave no finite logit"


class Sampler:
    """Draws the next token of each row.

    Args:
        vocab_size: tokens; columns of the logits beyond are padding of the model and never drawn.
        device: of the logits.
    """

    def __init__(self, vocab_size: int, device: torch.device | str = "cpu") -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)

    @torch.inference_mode()
    def sample(self, logits_RV: Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
        """The answer to each row. Nothing of a request makes this raise; errors are in the answers.

        Args:
            logits_RV: raw logits, one row for each of `rows`.
            rows: what is asked.
        """
        assert len(logits_RV) == len(rows) and logits_RV.shape[-1] >= self.vocab_size
        if not rows:
            return []
        logits_RV = logits_RV[:, : self.vocab_size].float()
        errors = ["" if math.isfinite(best) else NOT_FINITE for best in logits_RV.amax(-1).tolist()]
        sound = [r for r, error in enumerate(errors) if not error]
        drawn = self._draw(logits_RV, {r: rows[r] for r in sound if rows[r].target is None}, errors)
        logprobs = self._logprobs(logits_RV, {r: rows[r] for r in sound if not errors[r]}, drawn)
        return [Sampled(drawn.get(r), logprobs.get(r), errors[r]) for r in range(len(rows))]

    def _draw(self, logits_RV: Tensor, rows: dict[int, SampleRow], errors: list[str]) -> dict[int, int]:
        """A token for each of `rows`; a row that cannot have one gets its entry in `errors`."""
        changed = {r: _changed(logits_RV[r], row) for r, row in rows.items() if _changes(row)}
        for r, logits_V in changed.items():
            if not math.isfinite(float(logits_V.amax())):
                errors[r] = _FORBIDDEN
        rows = {r: row for r, row in rows.items() if not errors[r]}
        groups: dict[tuple[float, int, float, float], list[int]] = defaultdict(list)
        for r, row in rows.items():
            groups[_options(row.params)].append(r)
        drawn: dict[int, int] = {}
        for (temperature, top_k, top_p, min_p), members in groups.items():
            for block in _blocks(members, self.vocab_size):
                logits_BV = _gathered(logits_RV, changed, block)
                if temperature == 0:
                    ids = logits_BV.argmax(-1)  # the first of equals
                else:
                    weights_BV = filtered_weights(
                        logits_BV, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
                    )
                    ids = _inverse(weights_BV, [uniform(rows[r].seed, rows[r].num_drawn) for r in block])
                drawn.update(zip(block, ids.tolist(), strict=True))
        return drawn

    def _logprobs(
        self, logits_RV: Tensor, rows: dict[int, SampleRow], drawn: dict[int, int]
    ) -> dict[int, TokenLogprobs]:
        """Log-probabilities of what was drawn, or of the target, for the rows that want them."""
        groups: dict[int, list[int]] = defaultdict(list)
        for r, row in rows.items():
            wanted = row.params.logprobs if row.target is None else row.params.prompt_logprobs
            if wanted is not None:
                groups[min(wanted, self.vocab_size)].append(r)
        found: dict[int, TokenLogprobs] = {}
        for count, members in groups.items():
            for block in _blocks(members, self.vocab_size):
                tokens = [drawn[r] if (target := rows[r].target) is None else target for r in block]
                found.update(zip(block, token_logprobs(logits_RV[block], tokens, count), strict=True))
        return found


def token_logprobs(logits_BV: Tensor, tokens: Sequence[int], count: int) -> list[TokenLogprobs]:
    """Log-probabilities of one token of each row and of the `count` most likely ones, best first."""
    logits_BV = logits_BV.float()
    log_probs_BV = logits_BV.double().log_softmax(-1).clamp_(min=_LEAST_LOGPROB)
    tokens_B1 = torch.tensor(tokens, dtype=torch.int64, device=logits_BV.device)[:, None]
    chosen = log_probs_BV.gather(-1, tokens_B1).flatten().tolist()
    ranks = (logits_BV >= logits_BV.gather(-1, tokens_B1)).sum(-1).tolist()
    if count == 0:
        return [TokenLogprobs(logprob, rank) for logprob, rank in zip(chosen, ranks, strict=True)]
    ids_BN = best_first(logits_BV, count)
    tops = [
        tuple(zip(ids, values, strict=True))
        for ids, values in zip(ids_BN.tolist(), log_probs_BV.gather(-1, ids_BN).tolist(), strict=True)
    ]
    return [TokenLogprobs(*each) for each in zip(chosen, ranks, tops, strict=True)]


def uniform(seed: int, index: int) -> float:
    """Random number `index` of `seed`, strictly between 0 and 1; the same on every machine, for ever."""
    key = np.array([seed, _STREAM], dtype=np.uint64)
    bits = int(np.random.Philox(key=key, counter=index).random_raw())
    return ((bits >> 12) + 0.5) * 2.0**-52


def _gathered(logits_RV: Tensor, changed: dict[int, Tensor], block: Sequence[int]) -> Tensor:
    """The rows of a block; the tensor itself, not a copy, where they are neighbours and none is changed."""
    if block[-1] - block[0] == len(block) - 1 and not any(r in changed for r in block):
        return logits_RV[block[0] : block[-1] + 1]
    return torch.stack([changed[r] if r in changed else logits_RV[r] for r in block])


def _inverse(weights_BV: Tensor, uniforms: Sequence[float]) -> Tensor:
    """For each row the first id (B,) at which the running sum of weights passes u times their total."""
    sums_BV = weights_BV.cumsum(-1)
    u_B1 = torch.tensor(uniforms, dtype=torch.float64, device=weights_BV.device)[:, None]
    total_B1 = sums_BV[:, -1:].contiguous()
    last_B1 = torch.searchsorted(sums_BV, total_B1, right=False)  # the last with a weight: u * total can round to total
    return torch.minimum(torch.searchsorted(sums_BV, u_B1 * total_B1, right=True), last_B1).flatten()


def _changes(row: SampleRow) -> bool:
    params = row.params
    return bool(
        row.banned
        or params.logit_bias
        or params.repetition_penalty != 1
        or (row.output and (params.presence_penalty or params.frequency_penalty))
    )


def _changed(logits_V: Tensor, row: SampleRow) -> Tensor:
    """The logits after penalties, bias and bans; a copy."""
    params, logits_V = row.params, logits_V.clone()

    def ids(tokens: Sequence[int]) -> Tensor:
        return torch.tensor(tokens, dtype=torch.int64, device=logits_V.device)

    if params.repetition_penalty != 1:
        seen_N = ids([*row.prompt, *row.output]).unique()
        values_N = logits_V[seen_N]
        penalty = params.repetition_penalty
        logits_V[seen_N] = torch.where(values_N > 0, values_N / penalty, values_N * penalty)
    if row.output and (params.presence_penalty or params.frequency_penalty):
        written_N, counts_N = ids(row.output).unique(return_counts=True)
        logits_V[written_N] -= params.presence_penalty + params.frequency_penalty * counts_N
    known = {token: bias for token, bias in params.logit_bias.items() if token < len(logits_V)}
    if known:
        logits_V[ids(tuple(known))] += torch.tensor(tuple(known.values()), dtype=torch.float32, device=logits_V.device)
    banned = [token for token in row.banned if token < len(logits_V)]
    if banned:
        logits_V[ids(banned)] = -math.inf
    return logits_V


def _options(params: SamplingParams) -> tuple[float, int, float, float]:
    """What decides how a row is drawn; one group for all that take the most likely token."""
    if params.is_greedy:
        return 0.0, 0, 1.0, 0.0
    return params.temperature, params.top_k, params.top_p, params.min_p


def _blocks(rows: Sequence[int], vocab_size: int) -> Iterator[Sequence[int]]:
    size = max(1, _BLOCK_VALUES // vocab_size)
    return (rows[start : start + size] for start in range(0, len(rows), size))
