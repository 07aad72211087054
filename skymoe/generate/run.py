"""`skymoe generate`: load a model directory, continue a prompt, stream the text."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from skymoe.data.text_stream import TextStream
from skymoe.data.tokenizer import TextTokenizer, load_tokenizer
from skymoe.generate.config import GenerateConfig
from skymoe.generate.decode import iter_tokens, token_budget
from skymoe.model.load import load
from skymoe.model.transformer import Transformer
from skymoe.ops.device import usable_device


@dataclass(frozen=True)
class GenerateReport:
    """One continuation.

    Attributes:
        prompt, text: what was given and what was written after it.
        prompt_ids, token_ids: the same as tokens; the end-of-text token is not among them.
        stop: why it ended: "eos", "length" (max_tokens) or "context" (the model's context is full).
        seed: of the sampling.
        prefill_seconds, decode_seconds: time to the first token, and for the tokens after it.
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
    """Continue `config.prompt`. `write` receives the text piece by piece as it is decoded, whole characters only.

    Raises:
        FormatError: the directory is no model, or has no tokenizer.
        ConfigError: the prompt does not fit the model's context.
        MissingExtraError: the package `tokenizers` is not installed.
    """
    device = usable_device(config.device)
    tokenizer = load_tokenizer(config.model)
    model = load(config.model, None if config.dtype is None else str(config.dtype), device)
    return generate_text(
        model,
        tokenizer,
        sys.stdin.read() if config.prompt == "-" else config.prompt,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
        ignore_eos=config.ignore_eos,
        write=write,
    )


def generate_text(
    model: Transformer,
    tokenizer: TextTokenizer,
    prompt: str,
    *,
    max_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = 0,
    ignore_eos: bool = False,
    write: Callable[[str], None] | None = None,
) -> GenerateReport:
    """Continue `prompt` with a loaded model; the arguments are those of `GenerateConfig`.

    An empty prompt starts a new document: the model continues its begin token, or the end of a document before it.
    """
    start = model.spec.bos_id if model.spec.bos_id is not None else tokenizer.eos_id
    prompt_ids = tokenizer.encode(prompt) or [start]
    room = token_budget(model.spec, len(prompt_ids), max_tokens)
    seed = secrets.randbelow(2**63) if seed is None else seed
    generator = torch.Generator(model.embed.weight.device).manual_seed(seed)
    stop_ids = () if ignore_eos else (*model.spec.eos_ids, tokenizer.eos_id)
    stream = TextStream(tokenizer.decode, prompt_ids)
    ids: list[int] = []
    pieces: list[str] = []
    clock = [time.perf_counter()]
    for token in iter_tokens(
        model, prompt_ids, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        generator=generator, stop_ids=stop_ids,
    ):  # fmt: skip
        clock.append(time.perf_counter())
        ids.append(token)
        _emit(stream.push(token), pieces, write)
    _emit(stream.finish(), pieces, write)
    prefill, decode = clock[min(1, len(ids))] - clock[0], clock[-1] - clock[min(1, len(ids))]
    return GenerateReport(
        prompt=prompt,
        text="".join(pieces),
        prompt_ids=tuple(prompt_ids),
        token_ids=tuple(ids),
        stop="eos" if len(ids) < room else "length" if room == max_tokens else "context",
        seed=seed,
        prefill_seconds=prefill,
        decode_seconds=decode,
        tokens_per_s=(len(ids) - 1) / decode if len(ids) > 1 and decode > 0 else 0.0,
    )


def _emit(piece: str, pieces: list[str], write: Callable[[str], None] | None) -> None:
    if piece:
        pieces.append(piece)
        if write is not None:
            write(piece)
