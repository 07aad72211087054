"""Who benchmarks/serve.py asks: servers started as their users start them, on this machine, and the model they read.

`transformers` has no server of its own to compare with, so it is given the best a short program can do: a batch of
whatever waits, generated to its longest answer, then the next (static batches, `generate` with its cache).
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from serve_load import Answer, Question, words

from skymoe.data.tokenizer import train_tokenizer
from skymoe.model.init import initialize
from skymoe.model.save import save_pretrained
from skymoe.model.transformer import Transformer
from skymoe.spec.flops import count_parameters
from skymoe.spec.model import Architecture, ModelSpec, MoESpec

_START_S = 600.0
SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(hidden_size=256, num_layers=4, num_heads=4, num_kv_heads=2, ffn_size=704, vocab_size=2000),
    "reference": dict(hidden_size=1024, num_layers=12, num_heads=16, num_kv_heads=4, ffn_size=2816, vocab_size=32000),
}
"""Mixtral-like with random weights, 8 experts, top 2; `reference`: 928 M parameters, 272 M of them active."""


def make_model(path: Path, size: str, dtype: str) -> Path:
    """A Mixtral-like directory with a tokenizer; random weights take as long as trained ones."""
    options = dict(SIZES[size])
    generator_words = " ".join(words(0))
    tokenizer = train_tokenizer([generator_words], options["vocab_size"])
    spec = ModelSpec(
        architecture=Architecture.MIXTRAL, max_position=4096, head_dim=options["hidden_size"] // options["num_heads"],
        moe=MoESpec(num_experts=8, top_k=2, ffn_size=options["ffn_size"], norm_topk=True), **options,
    )  # fmt: skip
    save_pretrained(initialize(Transformer(spec), 0), path, dtype=dtype)
    tokenizer.save(path)
    return path


@contextmanager
def skymoe_server(model: Path, options: Sequence[str]) -> Iterator[str]:
    """`skymoe serve`; its address."""
    command = [sys.executable, "-m", "skymoe", "serve", str(model), "--port", "0", "--name", "model", *options]
    with _running(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("ready http://"):
            raise SystemExit(f"skymoe serve did not start: {line!r}")
        yield line.split()[1]


@contextmanager
def llama_server(gguf: Path, threads: int, context: int) -> Iterator[str]:
    """llama-cpp-python's server, by its better options.

    By default a new request cuts off the one that runs (`interrupt_requests`), the logits of all prompt tokens are
    computed (`logits_all`), and half of the cores are used.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "llama_cpp.server", "--model", str(gguf), "--host", "127.0.0.1", "--port", str(port),
        "--n_ctx", str(context), "--n_threads", str(threads), "--n_threads_batch", str(threads),
        "--interrupt_requests", "False", "--logits_all", "False", "--verbose", "False",
    ]  # fmt: skip
    with _running(command, stdout=subprocess.DEVNULL) as process:
        url = f"http://127.0.0.1:{port}"
        end = time.monotonic() + _START_S
        while not _answers(f"{url}/v1/models"):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"llama_cpp.server did not start (exit code {process.poll()})")
            time.sleep(0.2)
        yield url


def _answers(url: str) -> bool:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@contextmanager
def _running(command: list[str], *, stdout: int) -> Iterator[subprocess.Popen[str]]:
    environment = {name: value for name, value in os.environ.items() if name != "SKYMOE_API_KEY"}
    process = subprocess.Popen(command, env=environment, text=True, stdout=stdout)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class StaticBatches:
    """transformers, in this process.

    Args:
        model: the directory.
        batch: the most prompts of a batch.
    """

    def __init__(self, model: Path, batch: int) -> None:
        from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

        self._tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(model / "tokenizer.json"), padding_side="left")
        self._tokenizer.pad_token_id = 0
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
        self._model.generation_config.eos_token_id = None  # every answer has its full length, as at the others
        self._batch = batch

    def run(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer all. A closed loop when all are due at 0: a client asks again when its own answer is complete."""
        begin, waiting, answers = time.perf_counter(), list(questions), []
        closed = all(question.due == 0 for question in questions)
        idle_since = [begin] * self._batch
        while waiting:
            time.sleep(max(0.0, begin + waiting[0].due - time.perf_counter()))
            now = time.perf_counter() - begin
            ready = [question for question in waiting if question.due <= now][: self._batch]
            del waiting[: len(ready)]
            starts = idle_since[: len(ready)] if closed else [begin + question.due for question in ready]
            batch = self._generate(ready, starts)
            idle_since = [answer.end for answer in batch]
            answers += batch
        return answers

    @torch.inference_mode()
    def _generate(self, questions: Sequence[Question], starts: Sequence[float]) -> list[Answer]:
        from transformers import LogitsProcessorList

        asked = self._tokenizer([question.prompt for question in questions], return_tensors="pt", padding=True)
        most = max(question.num_tokens for question in questions)
        times: list[float] = []

        def clock(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            times.append(time.perf_counter())  # the step is computed, its token is about to be chosen
            return scores

        self._model.generate(
            input_ids=asked.input_ids, attention_mask=asked.attention_mask, max_new_tokens=most, do_sample=False,
            logits_processor=LogitsProcessorList([clock]), pad_token_id=0,
        )  # fmt: skip
        lengths = asked.attention_mask.sum(1).tolist()
        return [
            Answer(q.num_tokens, start, times[q.num_tokens - 1], times[: q.num_tokens], q.num_tokens, length)
            for q, start, length in zip(questions, starts, lengths, strict=True)
        ]


def memory_read_gbs(rounds: int = 5) -> float:
    """10^9 bytes per second that all threads read: the best of some sums over 1 GiB, larger than any cache."""
    data = torch.ones(1 << 28)
    best = float("inf")
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - begin)
    return data.numel() * 4 / best / 1e9


def step_bytes(spec: ModelSpec, batch: int, bytes_per_weight: float) -> float:
    """Bytes of weights that one step of `batch` decoding sequences must read at least, cache or not.

    Each token takes `top_k` of E experts; of a batch, E (1 - (1 - k / E) ** batch) are taken when all are as likely.
    Keys and values, activations and the look-up table of the embedding are left out: the bound is lower for it.
    """
    count = count_parameters(spec)
    weights = float(count.active_without_embedding)
    if spec.moe is not None:
        taken = 1 - (1 - spec.moe.top_k / spec.moe.num_experts) ** batch
        weights += count.experts * taken - count.active_experts
    return weights * bytes_per_weight
