"""A planned pipeline against the uniform one, measured: same processes, same model, same memory for activations.

    python benchmarks/pipeline.py [--rounds 7] [--cap 0.6] [--out benchmarks/results/pipeline.json]

First `skymoe plan profile` measures what a layer, a layer that is run again, the embedding and the head with its loss
cost and keep, with both processes working at the same time. Then the planner divides a small MoE with a 64k vocabulary
over two stages (1f1b), and three divisions are trained in turns by two processes, each with one thread on a core of its
own (forward and backward, no optimizer):

    uniform    as many layers on every stage, and the same number of recomputed layers on every stage, the smallest
               with which the activations stay under the cap on both
    recompute  the same layers, but each stage recomputes only what it must
    planned    the fastest of all splits and recompute counts under the cap (whole layers), proven

The cap is a fraction of what the uniform split would keep on its first stage without any recomputation. Tokens per
second are medians over the rounds; beside them what the planner said before. The model's head costs about as many
layers as in small open models (Llama 3.2 1B: 4.3 layers of 16; Qwen2.5 0.5B: 9 of 24); what it costs here is printed.
The cap is on what autograd keeps, as the profile measured it: under bf16 autocast that is also a copy of the weights
for each micro-batch alive.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from skymoe.base.log import setup_logging
from skymoe.base.memory import keep_freed_memory
from skymoe.parallel.lifeline import LAUNCHER, die_with_launcher
from skymoe.parallel.mesh import build_mesh
from skymoe.plan.cost.model import prices
from skymoe.plan.hardware.catalogue import find_gpu
from skymoe.plan.hardware.gpu import Cluster, Precision
from skymoe.plan.hardware.profile import Profile
from skymoe.plan.memory.model import sizes
from skymoe.plan.pipeline.evaluate import evaluate, fits, uniform
from skymoe.plan.pipeline.problem import Answer, Problem
from skymoe.plan.pipeline.solve import solve
from skymoe.plan.shape import shape_of
from skymoe.plan.train.problem_of import problem_of
from skymoe.plan.work import Division, Work
from skymoe.profile.config import ProfileConfig
from skymoe.profile.live import LiveBytes
from skymoe.profile.run import run as measure_profile
from skymoe.profile.step import Trainer
from skymoe.spec.hf import config_from_spec
from skymoe.spec.layout import Layout
from skymoe.spec.model import Architecture, GateNormSpec, ModelSpec, MoESpec
from skymoe.spec.split import Split

PP, NUM_MICRO, TOKENS = 2, 8, 128
SPEC = ModelSpec(
    architecture=Architecture.SKYMOE, vocab_size=65536, hidden_size=256, num_layers=16, ffn_size=1024, num_heads=4,
    num_kv_heads=4, head_dim=64, max_position=TOKENS,
    moe=MoESpec(num_experts=4, top_k=2, ffn_size=2048, gate_norm=GateNormSpec()),
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """One division, trained: seconds of each step, busy part of each rank's time, bytes that its passes took."""

    seconds: list[float]
    busy: list[float]
    passes: list[int]


def profile_of(layers: int, repeats: int) -> Profile:
    """Of the model on two ranks at the same time."""
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(config_from_spec(SPEC)))
        return measure_profile(
            ProfileConfig(
                model=str(model), out=Path(directory) / "profile.json", layers=layers, tokens=TOKENS, precision="bf16",
                ranks=PP, repeats=max(3, repeats), gemms=4,
            )
        )  # fmt: skip


def work_of() -> Work:
    """A micro-batch of it on two ranks."""
    layout = Layout(pp=PP, stages=Split.even(2 * SPEC.num_layers, PP))
    return Work(
        shape=shape_of(SPEC), division=Division.of(layout, weight_bytes=4.0),
        cluster=Cluster(gpu=find_gpu("cpu"), num_gpus=PP, gpus_per_node=PP), sequence_length=TOKENS, micro_batch=1,
        num_micro=NUM_MICRO, precision=Precision.BF16,
    )  # fmt: skip


def problem(profile: Profile) -> Problem:
    """The pipeline with measured seconds and bytes; memory is that of activations only, and not limited yet."""
    work = work_of()
    found = problem_of(work, prices(work, profile), sizes(work), whole_layers=True)
    layer = profile.times.kinds[0]
    kept = (layer.attention.kept, layer.layer.kept - layer.attention.kept)
    units = tuple(
        replace(unit, static=0.0, transient=0.0, activation=kept[number % 2], checkpoint=layer.layer.kept_again)
        for number, unit in enumerate(found.units)
    )
    ends = (replace(end, static=0.0, transient=0.0, activation=0.0) for end in (found.embedding, found.head))
    embedding, head = ends
    return replace(found, units=units, embedding=embedding, head=head, memory=None)


def divisions(problem: Problem, cap: float) -> tuple[Problem, dict[str, Answer]]:
    """The problem under the cap, and the three that are compared."""
    even = uniform(problem).stages
    limited = replace(problem, memory=cap * evaluate(problem, even, (0,) * PP).memory[0])
    layers = [size // 2 for size in even.sizes]
    counts = [(first, last) for first in range(layers[0] + 1) for last in range(layers[1] + 1)]
    same = [answer for pair in counts if fits(limited, answer := evaluate(limited, even, pair))]
    planned = {
        "uniform": uniform(limited),
        "recompute": min(same, key=lambda answer: answer.makespan),
        "planned": solve(limited),
    }
    return limited, planned


def run_divisions(planned: Mapping[str, Answer], rounds: int) -> dict[str, Measured]:
    """Train all of them, in turns."""
    layouts = {name: Layout(pp=PP, stages=a.stages, recompute=a.recompute) for name, a in planned.items()}
    context, cores = multiprocessing.get_context("spawn"), sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as directory:
        results = context.SimpleQueue()
        arguments = (str(Path(directory) / "store"), cores, layouts, rounds, results)
        ranks = [context.Process(target=_rank, args=(rank, *arguments), daemon=True) for rank in range(PP)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit("a rank failed")
        found: dict[str, Measured] = results.get()
    return found


def _rank(rank: int, store: str, cores: list[int], layouts: Mapping[str, Layout], rounds: int, results: Any) -> None:
    die_with_launcher({LAUNCHER: str(os.getppid())})
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, PP), rank=rank, world_size=PP, timeout=timedelta(seconds=240)
    )
    trainers = {
        name: Trainer(
            SPEC, build_mesh(layout, torch.device("cpu")), sequence_length=TOKENS, micro_batch=1, num_micro=NUM_MICRO,
            precision=torch.bfloat16,
        )
        for name, layout in layouts.items()
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    busy: dict[str, list[float]] = {name: [] for name in trainers}
    for number in range(rounds + 1):
        for name, trainer in trainers.items():
            took, share = _step(trainer)
            if number:  # the first warms up
                seconds[name].append(took)
                busy[name].append(share)
    mine = {name: (statistics.median(busy[name]), _bytes(trainer)) for name, trainer in trainers.items()}
    all_ranks: list[Any] = [None] * PP
    dist.all_gather_object(all_ranks, mine)
    if rank == 0:
        columns = {name: list(zip(*(one[name] for one in all_ranks), strict=True)) for name in trainers}
        results.put({name: Measured(seconds[name], *map(list, columns[name])) for name in trainers})
    dist.barrier()
    dist.destroy_process_group()


def _step(trainer: Trainer) -> tuple[float, float]:
    """Seconds of a step from the moment in which all ranks are ready, and this rank's busy part of them."""
    dist.barrier()
    start = time.perf_counter()
    trainer.passes()
    dist.barrier()
    seconds = time.perf_counter() - start
    busy = sum(times.busy_s for times in trainer.pipeline.clock.timeline().times.values())
    trainer.optimizer.drop_gradients()
    return seconds, busy / seconds


def _bytes(trainer: Trainer) -> int:
    """The most that tensors of the passes take, in a step that is not timed."""
    with LiveBytes() as live:
        trainer.passes()
        peak = live.peak
    trainer.optimizer.drop_gradients()
    return peak


def report(profile: Profile, limited: Problem, planned: Mapping[str, Answer], found: Mapping[str, Measured]) -> Any:
    """As JSON."""
    tokens, layer, head = NUM_MICRO * TOKENS, profile.times.kinds[0].layer, profile.times.head
    arms = {
        name: {
            "layers": [size // 2 for size in answer.stages.sizes],
            "recompute": list(answer.recompute),
            "kept_mib": [size / 2**20 for size in answer.memory],
            "stage_s": [busy / NUM_MICRO for busy in answer.busy],
            "simulated_tokens_per_s": tokens / answer.makespan,
            "tokens_per_s": tokens / statistics.median(found[name].seconds),
            "seconds": found[name].seconds,
            "busy": found[name].busy,
            "passes_mib": [size / 2**20 for size in found[name].passes],
            "certificate": answer.certificate.method,
        }
        for name, answer in planned.items()
    }
    return {
        "torch": torch.__version__, "pp": PP, "num_micro": NUM_MICRO, "tokens_per_micro": TOKENS,
        "vocab_size": SPEC.vocab_size, "layers": SPEC.num_layers, "cap_mib": (limited.memory or 0.0) / 2**20,
        "load": os.getloadavg()[0], "times": profile.times.model_dump(mode="json"), "hop_s": limited.hop,
        "head_in_layers": (head.forward_s + head.backward_s) / (layer.forward_s + layer.backward_s), "arms": arms,
    }  # fmt: skip


def show(found: dict[str, Any]) -> None:
    """For people."""
    layer, base = found["times"]["kinds"][0]["layer"], found["arms"]["uniform"]
    print(f"a layer takes {1e3 * (layer['forward_s'] + layer['backward_s']):.1f} ms per micro-batch, the head "
          f"{found['head_in_layers']:.1f} layers; a hop {1e3 * found['hop_s']:.2f} ms")  # fmt: skip
    print(f"a layer keeps {layer['kept'] / 2**20:.1f} MiB per micro-batch; cap {found['cap_mib']:.1f} MiB\n")
    print(f"{'':10} {'layers':>9} {'recompute':>10} {'kept MiB':>13} {'busy':>11} {'tok/s':>7} {'simulated':>10} "
          f"{'gain':>7} {'said':>7}")  # fmt: skip
    for name, arm in found["arms"].items():
        pairs = ["/".join(f"{value:{form}}" for value in arm[key]) for key, form in
                 (("layers", "d"), ("recompute", "d"), ("kept_mib", ".1f"), ("busy", ".0%"))]  # fmt: skip
        gain = arm["tokens_per_s"] / base["tokens_per_s"] - 1
        said = arm["simulated_tokens_per_s"] / base["simulated_tokens_per_s"] - 1
        print(f"{name:10} {pairs[0]:>9} {pairs[1]:>10} {pairs[2]:>13} {pairs[3]:>11} {arm['tokens_per_s']:7.0f} "
              f"{arm['simulated_tokens_per_s']:10.0f} {gain:+7.1%} {said:+7.1%}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cap", type=float, default=0.6)
    parser.add_argument("--layers", type=int, default=4, help="that the profile times in a row")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/pipeline.json"))
    options = parser.parse_args()
    setup_logging()
    profile = profile_of(options.layers, options.rounds)
    limited, planned = divisions(problem(profile), options.cap)
    found = report(profile, limited, planned, run_divisions(planned, options.rounds))
    show(found)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
