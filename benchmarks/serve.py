"""`skymoe serve` under load, beside others on the same model and machine.

    python benchmarks/serve.py                                     a tiny random model; transformers' static batches
    python benchmarks/serve.py --model DIR --gguf FILE             and llama-cpp-python's server on the same model
    python benchmarks/serve.py --model DIR --peer vllm=http://127.0.0.1:9000       and any server that already runs
    python benchmarks/serve.py --rate 2 --mixed --first 1 --per-token 0.1          Poisson arrivals, an objective

All servers are up and get the same questions in turn, round by round (other requests would fall into other moments of
a machine that is never quite quiet); figures are medians over the rounds, ratios are skymoe's over the other's. Every
round is in the JSON. docs/serve_benchmark.md says what the figures mean and what is not fair about them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from serve_compare import as_json, compare, table
from serve_load import (
    Answer,
    Objective,
    Question,
    closed_loop,
    draw_lengths,
    make_text,
    open_loop,
    poisson_times,
    summarize,
)
from serve_peers import (
    SIZES,
    StaticBatches,
    llama_server,
    make_model,
    memory_read_gbs,
    skymoe_server,
    step_bytes,
)

from skymoe.base.files import write_atomic
from skymoe.data.tokenizer import TextTokenizer, load_tokenizer
from skymoe.spec.flops import count_parameters
from skymoe.spec.hf import spec_from_directory

Target = Callable[[list[Question]], list[Answer]]
RESULTS = Path(__file__).parent / "results" / "serve.json"


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a directory; default: a random Mixtral-like one is made")
    parser.add_argument("--size", choices=SIZES, default="tiny", help="of the model that is made")
    parser.add_argument("--dtype", default="bfloat16", help="of the model that is made")
    parser.add_argument("--serve", action="append", default=[], metavar="FLAG", help="to skymoe serve: --serve=--tp=2")
    parser.add_argument("--gguf", type=Path, help="the same model for llama-cpp-python's server")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=URL", help="a server that already runs")
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--any-precision", action="store_true", help="compare files of unlike bytes per weight")
    parser.add_argument("--clients", type=int, default=4, help="of the closed loop; the batch of transformers")
    parser.add_argument("--rate", type=float, help="Poisson arrivals per second instead of a closed loop")
    parser.add_argument("--requests", type=int, default=16, help="per round and server")
    parser.add_argument("--prompt", type=int, default=64, help="tokens, on the mean")
    parser.add_argument("--output", type=int, default=32, help="tokens, on the mean")
    parser.add_argument("--mixed", action="store_true", help="lengths from a quarter to seven quarters of the mean")
    parser.add_argument("--first", type=float, default=1.0, help="objective: seconds to the first token")
    parser.add_argument("--per-token", type=float, default=0.2, help="objective: mean seconds per token after it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def make_questions(options: argparse.Namespace, tokenizer: TextTokenizer, seed: int) -> list[Question]:
    """Those of a round; no two rounds share a prompt, as caches of prompts would answer them."""
    count = options.requests
    prompts = draw_lengths(options.prompt, count, mixed=options.mixed, seed=seed)
    outputs = draw_lengths(options.output, count, mixed=options.mixed, seed=seed + 1)
    times = poisson_times(options.rate, count, seed=seed) if options.rate else [0.0] * count
    texts = [
        make_text(length, seed=seed * 100_003 + at, count=lambda text: len(tokenizer.encode(text)))
        for at, length in enumerate(prompts)
    ]
    return [Question(*each) for each in zip(texts, outputs, times, strict=True)]


def over_http(url: str, body: dict[str, object], options: argparse.Namespace) -> Target:
    """A server as a target."""
    if options.rate:
        return lambda questions: asyncio.run(open_loop(url, questions, body))
    return lambda questions: asyncio.run(closed_loop(url, questions, body, options.clients))


def start_targets(options: argparse.Namespace, model: Path, stack: contextlib.ExitStack) -> dict[str, Target]:
    """Everybody who is asked, by name, `skymoe` first."""
    tokenizer = load_tokenizer(model)
    greedy: dict[str, object] = {"temperature": 0}
    ours = stack.enter_context(skymoe_server(model, ["--set", f"engine.threads={options.threads}", *options.serve]))
    targets = {"skymoe": over_http(ours, greedy | {"ignore_eos": True}, options)}
    if options.gguf:
        context = 2 * (options.prompt + options.output) + 64
        url = stack.enter_context(llama_server(options.gguf, options.threads, context))
        # it knows no ignore_eos, and would look through the last tokens at every step
        never_end = {"logit_bias": {str(tokenizer.eos_id): -100}, "repeat_penalty": 1.0}
        targets["llama_cpp.server"] = over_http(url, greedy | never_end, options)
    for peer in options.peer:
        name, _, url = peer.partition("=")
        targets[name] = over_http(url, greedy | {"ignore_eos": True}, options)
    if not options.no_transformers:
        targets["transformers, static batches"] = StaticBatches(model, options.clients).run
    return targets


def measure(options: argparse.Namespace, model: Path) -> dict[str, list[dict[str, Any]]]:
    """Every round of every target; before them one that is not counted."""
    tokenizer, objective = load_tokenizer(model), Objective(options.first, options.per_token)
    with contextlib.ExitStack() as stack:
        targets = start_targets(options, model, stack)
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in targets}
        for number in range(options.rounds + 1):
            questions = make_questions(options, tokenizer, options.seed + 1000 * number)
            for name, target in targets.items():
                found = summarize(target(questions), objective)
                if found["failed"]:
                    print(f"{name}: {found['failed']} of {found['asked']} failed: {found['errors']}", flush=True)
                if number:
                    rounds[name].append(found)
    return rounds


def physical_limit(options: argparse.Namespace, model: Path, gigabytes_per_s: float) -> dict[str, float]:
    """Tokens per second when every step reads its weights once, at the speed of memory, and nothing else takes time."""
    spec = spec_from_directory(model)
    width = model_bytes(model) / count_parameters(spec).total
    limits = {"memory_read_GB_per_s": gigabytes_per_s, "bytes_per_weight": width}
    for batch in sorted({1, options.clients}):
        size = step_bytes(spec, batch, width)
        limits[f"MB_per_step, {batch} at a time"] = size / 1e6
        limits[f"tokens_per_s, {batch} at a time"] = batch * gigabytes_per_s * 1e9 / size
    return limits


def model_bytes(model: Path) -> int:
    """Of the files with weights."""
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def check_precision(options: argparse.Namespace, model: Path) -> None:
    """Refuse a GGUF file that is much smaller or larger than the model: such a comparison says nothing."""
    if options.gguf and not options.any_precision:
        ratio = options.gguf.stat().st_size / model_bytes(model)
        if not 0.75 < ratio < 1.33:
            raise SystemExit(f"{options.gguf} is {ratio:.2f} times as large as {model}: another precision class")


def main() -> None:
    """Measure, print, write."""
    options = read_options()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or make_model(Path(folder) / "model", options.size, options.dtype)
        check_precision(options, model)
        read_gbs = memory_read_gbs()
        rounds = measure(options, model)
        result = {
            "options": {name: str(value) for name, value in vars(options).items() if value not in (None, [], False)},
            "parameters": count_parameters(spec_from_directory(model)).total,
            "limit": physical_limit(options, model, read_gbs),
            "failed": {name: sum(each["failed"] for each in found) for name, found in rounds.items()},
            "figures": compare(rounds),
            "rounds": rounds,
        }
    print(table(result["figures"]))
    print("limit", json.dumps(result["limit"], indent=1))
    write_atomic(options.out, as_json(result))


if __name__ == "__main__":
    main()
