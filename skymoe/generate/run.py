"""`skymoe generate`: load a model directory, continue a prompt, stream the text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from skymoe.generate.config import GenerateConfig


@dataclass(frozen=True)
class GenerateReport:
    """One continuation.

    Attributes:
        prompt, text: what was given and what was written after it.
        prompt_ids, token_ids: the same as tokens.
        stop: why it ended: "eos", "length" (max_tokens).
        seed: of the sampling.
        prefill_seconds, decode_seconds: time for the prompt and for the tokens after the first.
        tokens_per_s: decoded tokens per second, the first not counted; 0 with fewer than two tokens.
    """

    prompt: str
    text: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    stop: str
    seed: int
    prefill_seconds: float
    decode_seconds: float
    tokens_per_s: float


def run(config: GenerateConfig, *, write: Callable[[str], None] | None = None) -> GenerateReport:
    """Continue `config.prompt`. `write` receives the text piece by piece as it is decoded, whole characters only."""
    raise NotImplementedError
