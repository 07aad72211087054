"""A planned pipeline against the uniform one, measured: same processes, same model, same memory for activations.

    python benchmarks/pipeline.py [--rounds 7] [--cap 0.6] [--out benchmarks/results/pipeline.json]

Two processes, each with one thread on a core of its own, train a small MoE with a 64k vocabulary through a pipeline of
two stages (1f1b, forward and backward, no optimizer). First both measure, at the same time, what a layer, a recomputed
layer, the embedding and the head with its loss cost, and how many bytes a layer keeps for its backward pass. Then three
divisions run in turns:

    uniform    as many layers on every stage, and the same number of recomputed layers on every stage, the smallest
               with which the activations stay under the cap on both
    recompute  the same layers, but each stage recomputes only what it must
    planned    the fastest of all splits and recompute counts under the cap, by simulation of the measured costs

The cap is a fraction of what the uniform split would keep on its first stage without any recomputation. Tokens per
second are medians over the rounds; beside them what the simulator said before. The model's head costs about as many
layers as in small open models (Llama 3.2 1B: 4.3 layers of 16; Qwen2.5 0.5B: 9 of 24); what it costs here is printed.
The cap is on what layers keep (hidden states, routing, inputs of matmuls), reckoned from the bytes that autograd saves
in one layer, not measured in the run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from skymoe.base.memory import keep_freed_memory
from skymoe.model.batch import BatchInfo
from skymoe.model.inputs import attention_inputs
from skymoe.model.recompute import recompute_layer
from skymoe.parallel.mesh import Mesh, build_mesh
from skymoe.parallel.options import PartOptions
from skymoe.parallel.part import Part
from skymoe.parallel.pipeline import Pipeline
from skymoe.parallel.spread import build_parts, initialize_parts
from skymoe.plan.orders import one_f_one_b
from skymoe.plan.simulator import simulate
from skymoe.spec.layout import Layout
from skymoe.spec.model import Architecture, GateNormSpec, ModelSpec, MoESpec
from skymoe.spec.split import Split

PP, NUM_MICRO, TOKENS = 2, 8, 128
SPEC = ModelSpec(
    architecture=Architecture.SKYMOE, vocab_size=65536, hidden_size=256, num_layers=16, ffn_size=1024, num_heads=4,
    num_kv_heads=4, head_dim=64, max_position=TOKENS,
    moe=MoESpec(num_experts=4, top_k=2, ffn_size=2048, gate_norm=GateNormSpec()),
)  # fmt: skip
Micro = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Costs:
    """Seconds per micro-batch, bytes per micro-batch that a layer keeps, seconds of a hop."""

    layer_forward: float
    layer_backward: float
    recomputed_forward: float
    recomputed_backward: float
    embed_forward: float
    embed_backward: float
    head_forward: float
    head_backward: float
    hop: float
    layer_bytes: float
    recomputed_bytes: float


@dataclass(frozen=True)
class Division:
    """Layers, and recomputed ones among them, per stage."""

    layers: tuple[int, ...]
    recompute: tuple[int, ...]

    @property
    def layout(self) -> Layout:
        return Layout(pp=PP, stages=Split(self.layers).scaled(2), recompute=self.recompute)


def stage_seconds(costs: Costs, division: Division) -> tuple[list[float], list[float]]:
    """Forward and backward of each stage."""
    forward, backward = [], []
    for layers, again in zip(division.layers, division.recompute, strict=True):
        forward.append((layers - again) * costs.layer_forward + again * costs.recomputed_forward)
        backward.append((layers - again) * costs.layer_backward + again * costs.recomputed_backward)
    forward[0] += costs.embed_forward
    backward[0] += costs.embed_backward
    forward[-1] += costs.head_forward
    backward[-1] += costs.head_backward
    return forward, backward


def simulated_seconds(costs: Costs, division: Division) -> float:
    return simulate(one_f_one_b(PP, NUM_MICRO), *stage_seconds(costs, division), hop_s=costs.hop).span_s


def kept_bytes(costs: Costs, division: Division) -> list[float]:
    """Of each stage, with its PP - s micro-batches in flight; while a layer is run again, it keeps what it keeps."""
    return [
        (PP - stage) * ((layers - again) * costs.layer_bytes + again * costs.recomputed_bytes)
        + (costs.layer_bytes if again else 0)
        for stage, (layers, again) in enumerate(zip(division.layers, division.recompute, strict=True))
    ]


def divisions(costs: Costs, cap: float) -> dict[str, Division]:
    """The three that are compared; every rank comes to the same."""
    num = SPEC.num_layers
    even = Split.remainder_first(num, PP).sizes

    def fits(division: Division) -> bool:
        return max(kept_bytes(costs, division)) <= cap

    def all_of(layers: tuple[int, ...]) -> Iterator[Division]:
        counts = ((first, last) for first in range(layers[0] + 1) for last in range(layers[1] + 1))
        return (division for pair in counts if fits(division := Division(layers, pair)))

    def fastest(candidates: Iterator[Division]) -> Division:
        return min(candidates, key=lambda division: simulated_seconds(costs, division))

    everywhere = (Division(even, (count,) * PP) for count in range(min(even) + 1))
    return {
        "uniform": next(division for division in everywhere if fits(division)),
        "recompute": fastest(all_of(even)),
        "planned": fastest(division for first in range(1, num) for division in all_of((first, num - first))),
    }


def micro_batches() -> list[Micro]:
    generator = torch.Generator().manual_seed(0)
    draw = torch.randint(0, SPEC.vocab_size, (NUM_MICRO, 1, TOKENS + 1), generator=generator)
    return [(tokens[:, :-1], tokens[:, 1:]) for tokens in draw]


def make_part(mesh: Mesh) -> Part:
    parts = build_parts(SPEC, mesh, PartOptions(num_tokens=TOKENS), dtype=torch.float32)
    initialize_parts(parts, 0)
    return next(iter(parts.values()))


def timed(run: Callable[[], Tensor], repeats: int = 5) -> tuple[float, float]:
    """Median seconds of this thread in forward and in backward: what others do on the machine does not count."""
    times: list[tuple[float, float]] = []
    for _ in range(repeats + 2):
        start = time.thread_time()
        with torch.autocast("cpu", torch.bfloat16):
            out = run()
        middle = time.thread_time()
        out.backward(None if out.dim() == 0 else torch.ones_like(out))
        times.append((middle - start, time.thread_time() - middle))
    forward, backward = zip(*times[2:], strict=True)
    return statistics.median(forward), statistics.median(backward)


def saved_bytes(run: Callable[[], Any], model: torch.nn.Module) -> float:
    """Bytes of different storages that autograd keeps, parameters apart."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        run()
    widths = {weight.numel() for weight in model.parameters()}  # casts of weights are not activations
    return float(sum(t.untyped_storage().nbytes() for t in kept.values() if t.numel() not in widths))


def measure_costs(mesh: Mesh) -> Costs:
    """On all ranks at the same time, and the mean over them: they share the memory of the machine."""
    alone = Division((SPEC.num_layers // 2,) * PP, (0,) * PP).layout
    part = make_part(mesh)
    inputs = attention_inputs(SPEC, TOKENS, BatchInfo(), None, mesh.device)
    layer = next(iter(part.layers.values()))
    assert alone == mesh.layout

    def layer_once() -> Tensor:
        return layer(torch.randn(TOKENS, SPEC.hidden_size, requires_grad=True), inputs, BatchInfo())[0]

    def layer_again() -> Tensor:
        x_ND = torch.randn(TOKENS, SPEC.hidden_size, requires_grad=True)
        return recompute_layer(layer, x_ND, inputs, BatchInfo())[0]

    def end() -> Tensor:
        tokens_BT, targets_BT = micro_batches()[0]
        if part.is_first:
            return part.embedded(tokens_BT)
        return part.loss(torch.randn(TOKENS, SPEC.hidden_size, requires_grad=True), targets_BT)

    dist.barrier()
    rows = [*timed(layer_once), *timed(layer_again)]
    ends = [0.0] * 4
    ends[2 * mesh.coordinate.pp : 2 * mesh.coordinate.pp + 2] = timed(end)
    values = torch.tensor([*rows, saved_bytes(layer_once, layer)], dtype=torch.float64) / PP
    found = torch.cat([values, torch.tensor([*ends, hop_seconds(mesh)], dtype=torch.float64)])
    dist.all_reduce(found)
    layer_f, layer_b, again_f, again_b, kept, *others = found.tolist()
    hop = others.pop() / PP
    return Costs(layer_f, layer_b, again_f, again_b, *others, hop, kept, 4.0 * TOKENS * SPEC.hidden_size)


def hop_seconds(mesh: Mesh, repeats: int = 20) -> float:
    """Half a round trip of a boundary tensor."""
    x_ND = torch.zeros(TOKENS, SPEC.hidden_size)
    times = []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        if mesh.rank == 0:
            dist.send(x_ND, 1)
            dist.recv(x_ND, 1)
        else:
            dist.recv(x_ND, 0)
            dist.send(x_ND, 0)
        times.append((time.perf_counter() - start) / 2)
    return statistics.median(times)


class Arm:
    """One division, ready to run."""

    def __init__(self, mesh: Mesh) -> None:
        self.part = make_part(mesh)
        self.pipeline: Pipeline[Micro] = Pipeline(
            (self.part.stage,), mesh, num_micro=NUM_MICRO, rows=TOKENS, hidden_size=SPEC.hidden_size,
            dtype=torch.float32,
        )  # fmt: skip

    def forward(self, stage: int, x_ND: Tensor | None, micro: Micro) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.part(x_ND, micro[0], BatchInfo())

    def loss(self, x_ND: Tensor, micro: Micro) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.part.loss(x_ND, micro[1]) / (NUM_MICRO * TOKENS)

    def step(self, micros: list[Micro]) -> tuple[float, float]:
        """Seconds of a step from the moment in which all ranks are ready, and this rank's busy part of them."""
        dist.barrier()
        start = time.perf_counter()
        self.pipeline.train(micros, self.forward, self.loss)
        dist.barrier()
        seconds = time.perf_counter() - start
        busy = sum(times.busy_s for times in self.pipeline.clock.timeline().times.values())
        self.part.zero_grad(set_to_none=False)
        return seconds, busy / seconds


def rank_main(rank: int, store: str, cores: list[int], options: argparse.Namespace, results: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, PP), rank=rank, world_size=PP, timeout=timedelta(seconds=240)
    )
    even = Division(Split.remainder_first(SPEC.num_layers, PP).sizes, (0,) * PP)
    costs = measure_costs(build_mesh(even.layout, torch.device("cpu")))
    cap = options.cap * kept_bytes(costs, even)[0]
    chosen = divisions(costs, cap)
    arms = {name: Arm(build_mesh(division.layout, torch.device("cpu"))) for name, division in chosen.items()}
    micros, seconds, busy = micro_batches(), {name: [] for name in arms}, {name: [] for name in arms}
    for round_ in range(options.rounds + 1):
        for name, arm in arms.items():
            took, share = arm.step(micros)
            if round_:  # the first warms up
                seconds[name].append(took)
                busy[name].append(share)
    mine = torch.tensor([statistics.median(busy[name]) for name in arms])
    shares = [torch.zeros_like(mine) for _ in range(PP)]
    dist.all_gather(shares, mine)
    if rank == 0:
        results.put(report(costs, cap, chosen, seconds, torch.stack(shares).T.tolist()))
    dist.barrier()
    dist.destroy_process_group()


def report(
    costs: Costs, cap: float, chosen: dict[str, Division], seconds: dict[str, list[float]], busy: list[list[float]]
) -> dict[str, Any]:
    tokens = NUM_MICRO * TOKENS
    arms = {
        name: {
            **asdict(division),
            "kept_mib": [size / 2**20 for size in kept_bytes(costs, division)],
            "stage_s": [f + b for f, b in zip(*stage_seconds(costs, division), strict=True)],
            "simulated_tokens_per_s": tokens / simulated_seconds(costs, division),
            "tokens_per_s": tokens / statistics.median(seconds[name]),
            "seconds": seconds[name],
            "busy": busy[index],
        }
        for index, (name, division) in enumerate(chosen.items())
    }
    layer = costs.layer_forward + costs.layer_backward
    return {
        "torch": torch.__version__, "pp": PP, "num_micro": NUM_MICRO, "tokens_per_micro": TOKENS,
        "vocab_size": SPEC.vocab_size, "layers": SPEC.num_layers, "cap_mib": cap / 2**20, "costs": asdict(costs),
        "head_in_layers": (costs.head_forward + costs.head_backward) / layer, "arms": arms,
    }  # fmt: skip


def show(found: dict[str, Any]) -> None:
    costs, base = found["costs"], found["arms"]["uniform"]
    print(f"a layer takes {1e3 * (costs['layer_forward'] + costs['layer_backward']):.1f} ms per micro-batch, the head "
          f"{found['head_in_layers']:.1f} layers; a hop {1e3 * costs['hop']:.2f} ms")  # fmt: skip
    print(f"a layer keeps {costs['layer_bytes'] / 2**20:.1f} MiB per micro-batch; cap {found['cap_mib']:.1f} MiB\n")
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
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/pipeline.json"))
    options = parser.parse_args()
    context, cores = multiprocessing.get_context("spawn"), sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as directory:
        results = context.SimpleQueue()
        arguments = (str(Path(directory) / "store"), cores, options, results)
        ranks = [context.Process(target=rank_main, args=(rank, *arguments)) for rank in range(PP)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit("a rank failed")
        found = results.get()
    show(found)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
