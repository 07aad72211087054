"""Upcycling side by side: skymoe, mergekit-moe, and `cp` of the output; wall time, throughput, peak memory.

    python benchmarks/upcycle.py [--mergekit PATH/TO/mergekit-moe] [--rounds 3] [--cache warm|cold] [--size full|tiny]

A random dense Llama (bfloat16; `full`: the shapes of TinyLlama, 2.2 GB in two files) becomes a mixture of eight copies,
12.9 GB. Every round runs all contenders, each round in another order, and medians are compared:

    skymoe            `skymoe upcycle` without the receipt; the dense files are hashed for the record
    skymoe + receipt  the same with its receipt: both models computed on random tokens and compared
    mergekit          `mergekit-moe` with gate_mode random, what its documentation names for sparse upcycling
    cp                `cp -r` of skymoe's output; may leave gigabytes in memory that are not on the disk yet
    cp + sync         `cp -r` and `sync -f`: like skymoe, it ends when the data is on the disk
    disk              the same bytes from memory past the page cache (O_DIRECT): the physical limit

mergekit needs an environment of its own (`python -m venv M && M/bin/pip install mergekit`). Before each run the disk is
left to finish, and the files to be read are read once (`warm`) or evicted (`cold`) from the page cache. Peak memory is
the kernel's figure for the process (ru_maxrss), the page cache not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXPERTS, TOP_K = 8, 2
SIZES = {  # layers, width, FFN, heads, key/value heads, vocabulary
    "full": (22, 2048, 5632, 32, 4, 32_000),
    "tiny": (2, 128, 352, 4, 2, 1_000),
}
CHUNK = 8 * 2**20


@dataclass(frozen=True)
class Contender:
    """A command, what it reads, and what it leaves."""

    name: str
    command: tuple[str, ...]
    source: Path | None
    output: Path


@dataclass(frozen=True)
class Run:
    """One timed run."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def make_dense(directory: Path, size: str) -> None:
    """A random Llama checkpoint with a tokenizer of two words. Runs in a process of its own: it needs torch."""
    import torch

    from skymoe.base.dtype import DType
    from skymoe.spec.hf import spec_from_directory
    from skymoe.weights.names import tensor_table
    from skymoe.weights.writer import ShardedWriter

    layers, width, ffn, heads, kv_heads, vocab = SIZES[size]
    directory.mkdir(parents=True)
    config = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", torch_dtype="bfloat16", hidden_act="silu",
        num_hidden_layers=layers, hidden_size=width, intermediate_size=ffn, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocab, max_position_embeddings=2048, rms_norm_eps=1e-5,
        rope_theta=10000.0, tie_word_embeddings=False, initializer_range=0.02, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    words = {"type": "WordLevel", "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2}, "unk_token": "<unk>"}
    tokenizer = {"version": "1.0", "added_tokens": [], "model": words}
    named = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    for name, content in (("config", config), ("tokenizer", tokenizer), ("tokenizer_config", named)):
        (directory / f"{name}.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    table = tensor_table(spec_from_directory(directory))
    generator = torch.Generator().manual_seed(0)
    plan = [(name, DType.BFLOAT16, place.shape) for name, place in table.items()]
    total = sum(2 * torch.Size(shape).numel() for _, _, shape in plan)
    with ShardedWriter(directory, plan, max_shard_bytes=total // 2 + CHUNK) as writer:
        for name, _, shape in plan:
            tensor = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02
            writer.add(name, tensor.bfloat16())


def write_past_the_cache(path: Path, num_bytes: int) -> None:
    """Random bytes straight to the disk."""
    import mmap

    with mmap.mmap(-1, CHUNK) as buffer:  # aligned to a page, as O_DIRECT wants
        buffer.write(os.urandom(CHUNK))
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        for _ in range(num_bytes // CHUNK):
            os.write(descriptor, buffer)
        os.fsync(descriptor)
        os.close(descriptor)


def check(dense: Path, moe: Path) -> dict[str, Any]:
    """Does the new model compute what the dense one does? Measured by our receipt, if it can be read."""
    from skymoe.base.errors import SkymoeError
    from skymoe.convert.exactness import Exactness
    from skymoe.convert.receipt import measure

    try:
        receipt = measure(dense, moe, Exactness(True, "eight copies"), num_tokens=64, seed=0)
    except SkymoeError as error:
        return {"unreadable": str(error)}
    return {"max_abs_dlogit": receipt.max_abs_dlogit, "kl": receipt.kl, "max_abs_logit": receipt.max_abs_logit}


def run_role(role: str, *arguments: object) -> str:
    """Do `--role` in a child, so that this process stays small: a child's peak memory begins at its parent's."""
    command = [sys.executable, __file__, "--role", role, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def contenders(work: Path, dense: Path, mergekit: Path | None, num_bytes: int) -> list[Contender]:
    """What is timed, `skymoe` first: `cp` copies its output."""
    moe, receipt, merged, copy = work / "moe", work / "moe-receipt", work / "merged", work / "copy"
    upcycle = (sys.executable, "-m", "skymoe", "upcycle", str(dense))
    options = ("--method", "copy", "--experts", str(EXPERTS), "--top-k", str(TOP_K), "--overwrite")
    found = [
        Contender("skymoe", (*upcycle, str(moe), *options, "--set", "receipt_tokens=0"), dense, moe),
        Contender("skymoe + receipt", (*upcycle, str(receipt), *options), dense, receipt),
        Contender("cp", ("cp", "-r", str(moe), str(copy)), moe, copy),
        Contender("cp + sync", ("sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"', str(moe), str(copy)), moe, copy),
        Contender("disk", (sys.executable, __file__, "--role", "write", str(copy), str(num_bytes)), None, copy),
    ]
    if mergekit is not None:
        expert = {"source_model": str(dense), "positive_prompts": [""]}
        config = {
            "base_model": str(dense), "gate_mode": "random", "dtype": "bfloat16", "experts_per_token": TOP_K,
            "experts": [expert] * EXPERTS,
        }  # fmt: skip
        path = work / "mergekit.yaml"
        path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
        found.insert(2, Contender("mergekit", (str(mergekit), str(path), str(merged), "--quiet"), dense, merged))
    return found


def prepare(contender: Contender, cache: str) -> None:
    """No output, an idle disk, and the source in the page cache or out of it."""
    remove(contender.output)
    os.sync()
    for path in sorted(contender.source.rglob("*")) if contender.source is not None else ():
        with path.open("rb", buffering=0) as file:
            if cache == "cold":
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while cache == "warm" and file.read(CHUNK):
                pass


def timed(contender: Contender, log: Path) -> Run:
    """Run the command and wait for it. Raises when it fails."""
    start = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(contender.command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        text = log.read_text(encoding="utf-8", errors="replace")[-3000:]
        raise SystemExit(f"{contender.name} failed ({os.waitstatus_to_exitcode(status)}):\n{text}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def remove(path: Path) -> None:
    """Whatever is at `path`."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def weight_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def play(
    everyone: list[Contender], dense: Path, rounds: int, cache: str
) -> tuple[dict[str, list[Run]], dict[str, Any]]:
    """All rounds. Between runs only skymoe's output stays, which `cp` copies."""
    runs: dict[str, list[Run]] = {one.name: [] for one in everyone}
    step_0: dict[str, Any] = {}
    for number in range(rounds):
        rest = everyone[1:]
        for one in [everyone[0], *rest[number % len(rest) :], *rest[: number % len(rest)]]:
            prepare(one, cache)
            runs[one.name].append(timed(one, one.output.with_suffix(".log")))
            print(f"  round {number + 1}: {one.name:17} {runs[one.name][-1].seconds:7.2f} s", flush=True)
            if one.name in ("skymoe", "mergekit") and one.name not in step_0:
                step_0[one.name] = json.loads(run_role("check", dense, one.output))
            if one is not everyone[0]:
                remove(one.output)
    return runs, step_0


def table(runs: dict[str, list[Run]], num_bytes: int) -> dict[str, dict[str, float]]:
    """Medians, and how many times as fast as `cp + sync`."""
    result = {}
    for name, values in runs.items():
        seconds = statistics.median(run.seconds for run in values)
        result[name] = {
            "seconds": seconds, "fastest": min(run.seconds for run in values),
            "slowest": max(run.seconds for run in values), "gb_per_s": num_bytes / 1e9 / seconds,
            "cpu_seconds": statistics.median(run.cpu_seconds for run in values),
            "peak_gb": max(run.peak_bytes for run in values) / 1e9,
        }  # fmt: skip
    for row in result.values():
        row["against_cp_sync"] = result["cp + sync"]["seconds"] / row["seconds"]
    return result


def main() -> None:
    """Make the dense model, run the rounds, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mergekit", type=Path, help="the executable mergekit-moe of another environment")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--cache", choices=("warm", "cold"), default="warm")
    parser.add_argument("--work", type=Path, default=Path(), help="a directory on the disk to measure; needs 32 GB")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/upcycle.json"))
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="upcycle-", dir=arguments.work) as name:
        work = Path(name)
        dense = work / "dense"
        run_role("make", dense, arguments.size)
        layers, width, ffn, *_ = SIZES[arguments.size]
        planned = weight_bytes(dense) + (EXPERTS - 1) * layers * 3 * width * ffn * 2
        everyone = contenders(work, dense, arguments.mergekit, planned)
        print(f"{weight_bytes(dense) / 1e9:.2f} GB dense, {planned / 1e9:.2f} GB out, {arguments.cache} page cache")
        runs, step_0 = play(everyone, dense, arguments.rounds, arguments.cache)
        written = weight_bytes(work / "moe")
    rows = table(runs, written)
    print(f"\n{'':17} {'seconds':>8} {'GB/s':>6} {'of cp + sync':>12} {'peak GB':>8} {'CPU s':>6}")
    for name, row in rows.items():
        print(f"{name:17} {row['seconds']:8.2f} {row['gb_per_s']:6.2f} {row['against_cp_sync']:12.2f} "
              f"{row['peak_gb']:8.2f} {row['cpu_seconds']:6.1f}")  # fmt: skip
    for name, found in step_0.items():
        print(f"{name} against the dense model: {found}")
    result = {
        "output_bytes": written, "rounds": arguments.rounds, "size": arguments.size, "cache": arguments.cache,
        "load_before": load, "cores": os.cpu_count(), "machine": platform.machine(),
        "python": platform.python_version(), "contenders": rows, "step_0": step_0,
    }  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def play_role(role: str, *arguments: str) -> None:
    """One of the jobs that need a process of their own."""
    match role, arguments:
        case "make", (directory, size):
            make_dense(Path(directory), size)
        case "write", (path, num_bytes):
            write_past_the_cache(Path(path), int(num_bytes))
        case "check", (dense, moe):
            print(json.dumps(check(Path(dense), Path(moe))))


if __name__ == "__main__":
    play_role(*sys.argv[2:]) if sys.argv[1:2] == ["--role"] else main()
