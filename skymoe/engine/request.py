"""A request, one row of logits it wants an answer to, and that answer. Plain data; no torch.

The scheduler makes a `SampleRow` for every row of logits of a step, in their order; the sampler answers each with a
`Sampled`. A row says everything the answer may depend on: draw i of a request is a function of its logits, its own
tokens, its parameters, its seed and i, and of nothing else in the batch. So a request that was preempted, or runs in
other company, draws the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from skymoe.engine.output import TokenLogprobs
from skymoe.engine.params import SamplingParams


@dataclass(frozen=True)
class Request:
    """What came in.

    Attributes:
        id: unique among the requests that are not finished.
        prompt: token ids, at least one.
        params: how to choose its tokens, and when to end.
        arrival: when it came, in seconds of the caller's clock; informs, decides nothing. Requests are served in the
            order in which they were added.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    arrival: float = 0.0


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One row of logits, and what is asked of it.

    Attributes:
        request_id: whose.
        prompt: its prompt.
        output: the tokens drawn so far. Not a copy: read it before the step is settled, change nothing.
        params: its parameters.
        seed: `params.seed`, or the fresh one that the request was given when it was added.
        num_drawn: index of this draw, from 0; `len(output)`, also after a preemption.
        banned: tokens that must not be drawn here: those that would end the text before `min_tokens`.
        target: None where a token is to be drawn. Else nothing is drawn: the row stands before this prompt token, and
            its log-probabilities (`params.prompt_logprobs`) are wanted.
    """

    request_id: str
    prompt: Sequence[int]
    output: Sequence[int]
    params: SamplingParams
    seed: int
    num_drawn: int
    banned: tuple[int, ...] = ()
    target: int | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """The answer to a `SampleRow`.

    Attributes:
        token_id: the token drawn; None for a row with a target, and where there is an error.
        logprobs: where asked for: of the token drawn, or of the target.
        error: why this request cannot go on, for its user; ends this request and no other.
    """

    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    error: str = ""
