"""SamplingParams: how one request wants its tokens chosen, and when it ends. Every number is bounded. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from skymoe.base.errors import ConfigError

MAX_LOGPROBS = 20
MAX_STOPS = 8
MAX_STOP_BYTES = 256
MAX_BIASES = 300
MAX_SEED = 2**63 - 1
MIN_REPETITION = 0.01  # logits are divided by it, and must stay numbers


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is sampled; the names and meanings of OpenAI and vLLM.

    The order: repetition, presence and frequency penalties and `logit_bias` change the logits; then temperature, min-p,
    top-k, top-p; then the draw.

    Attributes:
        max_tokens: the most tokens to write; None writes until the context is full.
        min_tokens: no end-of-text token and no token of `stop_token_ids` before so many, and no stop string in them.
        temperature: 0 takes the most likely token, the lowest id among equals.
        top_k: keep the k most likely; 0 keeps all.
        top_p: keep the fewest tokens whose probabilities sum to p.
        min_p: keep tokens at least this fraction as likely as the most likely one.
        presence_penalty, frequency_penalty: subtracted from the logit of each token written so far, once, and per time.
        repetition_penalty: divides positive logits of tokens of prompt and answer, multiplies negative ones.
        seed: makes the request repeatable, whatever else is in the batch; None takes a fresh one.
        logit_bias: token id to what is added to its logit, from -100 to 100.
        logprobs: report the log-probabilities of so many most likely tokens, beside the chosen one; None reports none.
        prompt_logprobs: the same of every prompt token but the first.
        stop: the text ends before the first of these; one alone may be given as it is.
        stop_token_ids: tokens that end the text, beside the end-of-text tokens of the model.
        ignore_eos: go on after an end-of-text token.
    """

    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _integer("max_tokens", self.max_tokens, 1, 2**31 - 1, optional=True)
        _integer("min_tokens", self.min_tokens, 0, self.max_tokens or 2**31 - 1)
        _number("temperature", self.temperature, 0, 100)
        _integer("top_k", self.top_k, 0, 2**31 - 1)
        _number("top_p", self.top_p, 0, 1, above=True)
        _number("min_p", self.min_p, 0, 1)
        _number("presence_penalty", self.presence_penalty, -2, 2)
        _number("frequency_penalty", self.frequency_penalty, -2, 2)
        _number("repetition_penalty", self.repetition_penalty, MIN_REPETITION, 10)
        _integer("seed", self.seed, 0, MAX_SEED, optional=True)
        _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS, optional=True)
        _integer("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS, optional=True)
        if isinstance(self.stop, str):  # would be taken for its letters
            object.__setattr__(self, "stop", (self.stop,))
        if len(self.stop) > MAX_STOPS or not all(_is_stop(text) for text in self.stop):
            raise ConfigError(f"stop takes up to {MAX_STOPS} strings of 1 to {MAX_STOP_BYTES} bytes")
        if len(self.stop_token_ids) > MAX_BIASES:
            raise ConfigError(f"stop_token_ids takes up to {MAX_BIASES} tokens")
        if len(self.logit_bias) > MAX_BIASES:
            raise ConfigError(f"logit_bias takes up to {MAX_BIASES} tokens, got {len(self.logit_bias)}")
        for token in (*self.logit_bias, *self.stop_token_ids):
            _integer("a token id", token, 0, 2**31 - 1)
        for bias in self.logit_bias.values():
            _number("a logit bias", bias, -100, 100)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0


def _is_stop(text: object) -> bool:
    try:
        return isinstance(text, str) and 0 < len(text.encode()) <= MAX_STOP_BYTES
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _integer(name: str, value: int | None, least: int, most: int, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(f"{name} must be a whole number from {least} to {most}, got {value!r:.40}")


def _number(name: str, value: float, least: float, most: float, *, above: bool = False) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not least <= value <= most or (above and value == least):
        bounds = f"above {least} and at most {most}" if above else f"from {least} to {most}"
        raise ConfigError(f"{name} must be {bounds}, got {value!r:.40}")
