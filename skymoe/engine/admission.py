"""Which requests an engine takes at all. Requests are hostile: what later steps rely on is looked at here. No torch."""

from __future__ import annotations

from collections.abc import Iterable

from skymoe.base.errors import ConfigError, printable
from skymoe.engine.request import Request

_MAX_ID = 256


class QueueFullError(ConfigError):
    """No more requests can wait: come back later."""


def check_request(request: Request, *, max_model_len: int, vocab_size: int | None) -> None:
    """Raises ConfigError if `request` could never be answered.

    Args:
        request: what came in.
        max_model_len: the most tokens, prompt and answer.
        vocab_size: token ids are below it; None leaves that open.
    """
    if not request.id or len(request.id) > _MAX_ID:
        raise ConfigError(f"the id of a request has 1 to {_MAX_ID} characters, got {len(request.id)}")
    if not request.prompt:
        raise ConfigError("the prompt is empty", hint="give at least one token")
    if len(request.prompt) >= max_model_len:
        raise ConfigError(
            f"the prompt has {len(request.prompt)} tokens; with one for the answer there is room for {max_model_len}",
            why="this is the context of the model, or what fits into the key/value cache",
            hint="shorten the prompt, or raise max_model_len or kv_memory_gb",
        )
    _check_tokens("the prompt", request.prompt, vocab_size)
    _check_tokens("logit_bias", request.params.logit_bias, vocab_size)
    _check_tokens("stop_token_ids", request.params.stop_token_ids, vocab_size)


def _check_tokens(where: str, tokens: Iterable[int], vocab_size: int | None) -> None:
    most = 2**31 if vocab_size is None else vocab_size
    for token in tokens:
        if type(token) is not int or not 0 <= token < most:
            raise ConfigError(f"{where} has the token {printable(repr(token), 40)}, not a number from 0 to {most - 1}")
