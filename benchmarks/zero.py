"""The optimizer's part of a step on two data-parallel ranks, gloo: ours, torch's ZeRO, and plain AdamW.

    python benchmarks/zero.py [--rounds 15] [--out benchmarks/results/zero.json]

Three contenders train the same stack of linear layers on the same numbers, with the same fused AdamW and clipping:

    zero        skymoe.parallel.zero: reduce, norm, update, all-gather
    torch_zero  DistributedDataParallel and torch.distributed.optim.ZeroRedundancyOptimizer, gradients as bucket views
    all_reduce  DistributedDataParallel and AdamW, the whole optimizer on every rank

Rounds interleave the contenders, and medians of whole steps (forward, backward, update, weights whole again) are
compared; `passes` is a step without any of that. DistributedDataParallel sends buckets while the backward pass still
runs, ours begins when it is over: without a pipeline that is the peers' advantage. Both ranks share the cores of one
machine and the network is its loopback interface: the times tell what the software costs, not what a network does.
Beside them: CPU time of a rank, all its threads, which a busy machine (`load`) disturbs less; bytes of optimizer state
on a rank, and how far the weights of the contenders are apart at the end.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from skymoe.parallel.adamw import AdamWSettings, GroupSettings
from skymoe.parallel.mesh import Mesh, build_mesh
from skymoe.parallel.zero import ZeroOptimizer
from skymoe.spec.layout import Layout
from skymoe.spec.split import Split
from skymoe.weights.slices import Piece, Slice

RANKS = 2
WIDTH, LAYERS, ROWS = 1024, 16, 16
LR, DECAY, CLIP, BETAS = 1e-3, 0.1, 1.0, (0.9, 0.95)
Step = Callable[[Tensor], None]


def build() -> nn.Sequential:
    """The same weights for everyone."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=layer % 2 == 0) for layer in range(LAYERS)))


def loss_of(model: nn.Module, x_ND: Tensor) -> Tensor:
    """Of this rank's share, so that gradients are sums over ranks."""
    return model(x_ND).square().sum()


def ours(model: nn.Module, mesh: Mesh) -> tuple[Step, Callable[[], int]]:
    """skymoe's ZeRO."""
    slices = {}
    for name, parameter in model.named_parameters():
        box = tuple((0, size) for size in parameter.shape)
        slices[name] = (parameter, Slice(name, tuple(parameter.shape), tuple(parameter.shape), (Piece(box, box),)))
    zero = ZeroOptimizer(
        {0: slices}, mesh, AdamWSettings(BETAS, 1e-8, CLIP), lambda name, parameter: GroupSettings(DECAY), tied=()
    )

    def step(x_ND: Tensor) -> None:
        loss_of(model, x_ND).backward()
        zero.reduce(0)
        zero.update(LR, float(zero.gradient_norm()))
        zero.settle()

    return step, lambda: zero.allocated().optimizer


def peer(model: nn.Module, *, divided: bool) -> tuple[Step, Callable[[], int]]:
    """DistributedDataParallel, which averages over ranks, with torch's ZeRO or none."""
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    options = {"lr": LR, "betas": BETAS, "weight_decay": DECAY, "fused": True}
    optimizer: torch.optim.Optimizer
    if divided:
        optimizer = ZeroRedundancyOptimizer(
            wrapped.parameters(), torch.optim.AdamW, parameters_as_bucket_view=True, **options
        )
    else:
        optimizer = torch.optim.AdamW(wrapped.parameters(), **options)

    def step(x_ND: Tensor) -> None:
        (RANKS * loss_of(wrapped, x_ND)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    def state_bytes() -> int:
        owned = optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer
        return sum(value.nbytes for state in owned.state.values() for value in state.values())

    return step, state_bytes


def passes(model: nn.Module) -> Step:
    """Forward and backward alone."""

    def step(x_ND: Tensor) -> None:
        loss_of(model, x_ND).backward()
        model.zero_grad(set_to_none=False)

    return step


def measure(rank: int, store: str, rounds: int, out: Path) -> None:
    """One rank; rank 0 writes the result."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS, timeout=timedelta(seconds=120)
    )
    mesh = build_mesh(Layout(dp=RANKS, stages=Split((2,))), torch.device("cpu"))
    models = {name: build() for name in ("zero", "torch_zero", "all_reduce")}
    made = {
        "zero": ours(models["zero"], mesh),
        "torch_zero": peer(models["torch_zero"], divided=True),
        "all_reduce": peer(models["all_reduce"], divided=False),
    }
    steps = {**{name: step for name, (step, _) in made.items()}, "passes": passes(build())}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        x_ND = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(RANKS * number + rank))
        for name, step in steps.items():
            dist.barrier()
            start, used = time.perf_counter(), time.process_time()
            step(x_ND)
            dist.barrier()
            if number >= 2:  # the first two warm up
                seconds[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - used)
    if rank == 0:
        result = {
            "ranks": RANKS,
            "parameters": sum(parameter.numel() for parameter in models["zero"].parameters()),
            "rounds": rounds,
            "median_ms": {name: round(1000 * statistics.median(found), 2) for name, found in seconds.items()},
            "quartiles_ms": {
                name: [round(1000 * edge, 2) for edge in statistics.quantiles(found, n=4)[::2]]
                for name, found in seconds.items()
            },
            "median_cpu_ms_of_rank_0": {name: round(1000 * statistics.median(found), 2) for name, found in cpu.items()},
            "load": os.getloadavg()[0],
            "optimizer_bytes_per_rank": {name: state_bytes() for name, (_, state_bytes) in made.items()},
            "largest_difference_of_weights": {
                name: max(
                    (one - other).detach().abs().max().item()
                    for one, other in zip(models["zero"].parameters(), models[name].parameters(), strict=True)
                )
                for name in ("torch_zero", "all_reduce")
            },
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread per rank",
        }
        print(json.dumps(result, indent=2))
        out.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/zero.json"))
    options = parser.parse_args()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        arguments = (str(Path(directory) / "store"), options.rounds, options.out)
        processes = [context.Process(target=measure, args=(rank, *arguments), daemon=True) for rank in range(RANKS)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit(f"ranks ended with {[process.exitcode for process in processes]}")


if __name__ == "__main__":
    main()
