"""Dispatch side by side: EDP, EP and ETP in modes R, G and A, at equal devices; bytes, times, exposed communication.

    python benchmarks/dispatch.py [--rounds 5] [--megabits 300] [--chunks 4 ..] [--expert edp ..]

1. *Bytes and time.* One MoE layer (experts included, router and attention not) on real gloo ranks over loopback, 2 x 2
   and 2 x 4 (dp x tp). Bytes are counted from the tensors handed to torch.distributed and must equal the formula of
   spec/traffic.py, with the loads that the tokens really have. Times are medians of interleaved rounds, of the slowest
   rank.
2. *A slow link.* 2 x 2 ranks, each in a network namespace with its own speed limit (benchmarks/slow_link.py), and each
   with an emulated accelerator, because four ranks cannot multiply at the same time on fewer cores: for each row, the
   experts sleep for the time in which the link sends three rows, and twice that in the backward pass. (At the paper's
   scale it would be 31 rows: 7.4 ms of experts beside 0.7 ms of mode G. Our links are slow.) Rows, links, gloo and
   autograd are real. First without a limit, then with it: one thing after the other (`overlap=False`), with metadata
   beside other work, and in `--chunks`, one travelling while another is multiplied.

       exposed = (time - time without a limit) / (time one after the other - time without a limit)

   Also bytes on the wire by the kernel's count, with headers, acknowledgements and metadata.
3. *Bytes at the paper's scale*, on paper.

All ranks share this machine's cores, so that what a rank waits for is often another rank's turn on a core. The times of
the first part compare these ways with one another here; they say nothing about a cluster.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import slow_link

from skymoe.spec.layout import Coordinate, DispatchMode, ExpertAxis, Layout
from skymoe.spec.split import Split
from skymoe.spec.traffic import DispatchShape, dispatch_bytes

SHAPE = DispatchShape(num_tokens=1024, hidden_size=256, itemsize=4, num_experts=16, top_k=2)
WIDTH = 512  # of each expert
ROWS_PER_ROW = 3  # the emulated accelerator multiplies a row in the time in which its link sends three
PAPER = DispatchShape(num_tokens=8192, hidden_size=4608, itemsize=2, num_experts=16, top_k=2)


@dataclass(frozen=True)
class Asked:
    """What is measured: rounds, the links' speed (None: loopback), numbers of chunks on slow links, expert axes."""

    rounds: int
    megabits: float | None
    chunks: tuple[int, ...]
    expert: tuple[str, ...]

    @property
    def ways(self) -> list[tuple[ExpertAxis, DispatchMode]]:
        """Rows of the tables."""
        return list(product(map(ExpertAxis, self.expert), DispatchMode))


@dataclass(frozen=True)
class Setting:
    """How a layer is run: the link's speed, and what overlaps."""

    name: str
    megabits: float | None
    overlap: bool
    chunks: int


def layout_of(dp: int, tp: int, expert: ExpertAxis, mode: DispatchMode) -> Layout:
    return Layout(dp=dp, tp=tp, expert=expert, dispatch=mode, stages=Split((2,)))


def settings_of(asked: Asked) -> list[Setting]:
    """Without a link to slow down there is one setting."""
    megabits = asked.megabits
    plain = Setting("no limit", None, overlap=False, chunks=1)
    if megabits is None:
        return [plain]
    return [
        plain,
        Setting("one by one", megabits, overlap=False, chunks=1),
        Setting("metadata", megabits, overlap=True, chunks=1),
        *(Setting(f"{chunks} chunks", megabits, overlap=True, chunks=chunks) for chunks in asked.chunks),
    ]


def play_rank(rank: int, dp: int, tp: int, asked: Asked, store: Path) -> None:
    """One rank: all ways and settings, round after round; its figures go to a file beside the store."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(store), dp * tp), rank=rank, world_size=dp * tp)
    found: dict[str, Any] = {}
    for number in range(asked.rounds + 1):  # the first warms up
        for setting in settings_of(asked):
            if asked.megabits is not None:
                slow_link.limit(setting.megabits)
            for expert, mode in asked.ways:
                row = measure(layout_of(dp, tp, expert, mode), setting, asked.megabits)
                kept = found.setdefault(f"{expert} {mode} {setting.name}", {"forward": [], "both": []})
                if number:
                    kept["forward"].append(row.pop("forward"))
                    kept["both"].append(row.pop("both"))
                    kept.update(row)
    store.with_name(f"rank{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def measure(layout: Layout, setting: Setting, megabits: float | None) -> dict[str, float]:
    """One forward and backward pass of the layer, and what they sent."""
    import torch
    import torch.distributed as dist

    from skymoe.ops.routing import count_assignments, route
    from skymoe.parallel.collectives import gather_counts
    from skymoe.parallel.dispatch import build_dispatcher, routed_experts
    from skymoe.parallel.traffic import Direction, Kind, Traffic

    mesh, traffic = mesh_of(layout), Traffic()
    dispatcher = build_dispatcher(
        mesh, SHAPE.num_experts, SHAPE.num_tokens, overlap=setting.overlap, chunks=setting.chunks, traffic=traffic
    )
    draw = torch.Generator().manual_seed(mesh.coordinate.dp)
    own = (
        layout.tokens(SHAPE.num_tokens).part(mesh.coordinate.tp)
        if layout.sequence_parallel
        else range(SHAPE.num_tokens)
    )
    x_ND = torch.randn(SHAPE.num_tokens, SHAPE.hidden_size, generator=draw)[own.start : own.stop].requires_grad_()
    logits = torch.randn(SHAPE.num_tokens, SHAPE.num_experts, generator=draw)[own.start : own.stop].requires_grad_()
    experts = sleeping_experts(layout, megabits) if megabits else real_experts(layout, mesh.coordinate)
    routing = route(logits, top_k=SHAPE.top_k)
    loads = gather_counts(count_assignments(routing.expert_ids_TK, SHAPE.num_experts), mesh.dp_tp).tolist()
    dist.barrier()
    wire, start = slow_link.bytes_sent() if megabits else 0, time.perf_counter()
    y_ND = routed_experts(dispatcher, experts, x_ND, routing)
    forward = time.perf_counter() - start
    if megabits:
        dist.barrier()
        wire, start = slow_link.bytes_sent() - wire, time.perf_counter() - forward
    y_ND.backward(torch.ones_like(y_ND))
    return {
        "forward": forward,
        "both": time.perf_counter() - start,
        "wire": wire,
        "bytes": traffic.activations(Direction.FORWARD),
        "bytes_backward": traffic.activations(Direction.BACKWARD),
        "metadata": traffic.bytes(Kind.METADATA, Direction.FORWARD),
        "formula": dispatch_bytes(layout, mesh.coordinate, SHAPE, loads),
    }


def real_experts(layout: Layout, place: Coordinate) -> Any:
    """SwiGLU experts with random weights, cut as the layout says."""
    import torch

    from skymoe.ops.experts import ExpertsBackend, expert_swiglu

    local = layout.experts(SHAPE.num_experts).sizes[layout.expert_rank(place)]
    width = layout.ffn(WIDTH).sizes[place.tp] if layout.expert is ExpertAxis.ETP else WIDTH
    gate_up = torch.randn(local, 2 * width, SHAPE.hidden_size).mul_(0.05).requires_grad_()
    down = torch.randn(local, SHAPE.hidden_size, width).mul_(0.05).requires_grad_()
    return lambda x_RD, ends_E: expert_swiglu(x_RD, gate_up, down, ends_E, ExpertsBackend.GROUPED)


def sleeping_experts(layout: Layout, megabits: float) -> Any:
    """An accelerator that needs the same time for each row (under etp a part of it) and returns the rows."""
    import torch

    row_bits = 8 * SHAPE.hidden_size * SHAPE.itemsize
    per_row = ROWS_PER_ROW * row_bits / (megabits * 1e6) / (layout.tp if layout.expert is ExpertAxis.ETP else 1)

    class Accelerator(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x_RD: Any) -> Any:
            time.sleep(x_RD.shape[0] * per_row)
            return x_RD.clone()

        @staticmethod
        def backward(ctx: Any, grad_RD: Any) -> Any:
            time.sleep(2 * grad_RD.shape[0] * per_row)
            return grad_RD.clone()

    return lambda x_RD, ends_E: Accelerator.apply(x_RD)


_MESHES: dict[tuple[int, int], Any] = {}


def mesh_of(layout: Layout) -> Any:
    """The groups are made once for each size of world."""
    import torch

    from skymoe.parallel.mesh import build_mesh

    sizes = (layout.dp, layout.tp)
    if sizes not in _MESHES:
        _MESHES[sizes] = build_mesh(layout, torch.device("cpu"))
    return replace(_MESHES[sizes], layout=layout)


def play_world(dp: int, tp: int, asked: Asked, namespaces: list[str] | None = None) -> list[Any]:
    """All ranks, each in a process (and its namespace); their figures by rank."""
    interface = slow_link.DEVICE if namespaces else "lo"
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": interface, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="dispatch-") as directory:
        store = Path(directory) / "store"
        processes = []
        for rank in range(dp * tp):
            inside = ["ip", "netns", "exec", namespaces[rank]] if namespaces else []
            told = [str(rank), str(dp), str(tp), json.dumps(vars(asked)), str(store)]
            command = [*inside, sys.executable, __file__, "--role", "rank", *told]
            processes.append(subprocess.Popen(command, env=environment))
        try:
            codes = [process.wait(timeout=300) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if any(codes):
            raise SystemExit(f"ranks ended with {codes}")
        return [json.loads((Path(directory) / f"rank{rank}.json").read_text()) for rank in range(dp * tp)]


def table(ranks: list[Any]) -> dict[str, dict[str, float]]:
    """Sums of bytes over ranks; medians over rounds of the slowest rank's seconds. Raises if bytes are not equal."""
    rows = {}
    for key in ranks[0]:
        for rank, one in enumerate(ranks):
            seen = one[key]
            if not seen["bytes"] == seen["bytes_backward"] == seen["formula"]:
                raise SystemExit(f"{key}, rank {rank}: measured bytes and formula differ: {seen}")
        row = {name: sum(one[key][name] for one in ranks) for name in ("bytes", "formula", "metadata", "wire")}
        for name in ("forward", "both"):
            rounds = [max(times) for times in zip(*(one[key][name] for one in ranks), strict=True)]
            row |= {f"{name}_ms": 1e3 * statistics.median(rounds), f"{name}_fastest_ms": 1e3 * min(rounds)}
        rows[key] = row
    return rows


def print_equal_devices(dp: int, tp: int, asked: Asked, rows: dict[str, dict[str, float]]) -> None:
    print(f"\n{dp} x {tp} ranks (dp x tp) on loopback: MB sent by all ranks in a forward pass, ms")
    print(f"{'':8} {'measured':>9} {'formula':>9} {'metadata':>9} {'forward':>8} {'+ backward':>11}")
    for expert, mode in asked.ways:
        row = rows[f"{expert} {mode} no limit"]
        print(f"{expert:4} {mode:3} {row['bytes'] / 1e6:9.3f} {row['formula'] / 1e6:9.3f} {row['metadata'] / 1e6:9.3f} "
              f"{row['forward_ms']:8.1f} {row['both_ms']:11.1f}")  # fmt: skip


def print_slow_link(rows: dict[str, dict[str, float]], asked: Asked) -> None:
    settings = settings_of(asked)
    plain, one_by_one, *others = (setting.name for setting in settings)
    for name, title in (("forward_ms", "forward"), ("both_ms", "forward and backward")):
        print(
            f"\n2 x 2 ranks at {settings[1].megabits:g} Mbit/s, emulated accelerators, {title}: ms, share left exposed"
        )
        heads = "".join(f"{other:>18}" for other in others)
        print(f"{'':8} {'wire/sent':>9} {'no limit':>9} {'one by one':>10} {heads}")
        for expert, mode in asked.ways:
            way = f"{expert} {mode}"
            fast, slow = rows[f"{way} {plain}"], rows[f"{way} {one_by_one}"]
            cells = ""
            for other in others:
                row = rows[f"{way} {other}"]
                row[f"exposed_{name[:-3]}"] = (row[name] - fast[name]) / (slow[name] - fast[name])
                cells += f"{row[name]:10.1f} {row[f'exposed_{name[:-3]}']:6.0%} "
            ratio = fast["wire"] / (fast["bytes"] + fast["metadata"])
            print(f"{expert:4} {mode:3} {ratio:9.3f} {fast[name]:9.1f} {slow[name]:10.1f} {cells}")


def paper_scale() -> dict[str, float]:
    """MB per rank, layer and forward pass, tp 4; ep over 4 replicas (an expert per rank), etp over 16."""
    found = {}
    for expert, mode, dp in product(ExpertAxis, DispatchMode, (4, 16)):
        if expert is ExpertAxis.EP and dp > 4:
            continue
        sent = dispatch_bytes(layout_of(dp, 4, expert, mode), Coordinate(0, 0, 0), PAPER)
        found[f"{expert} {mode} dp {dp}"] = sent / 1e6
    return found


def main() -> None:
    """Run both parts, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabits", type=float, default=300.0, help="speed of each rank's link")
    parser.add_argument("--chunks", type=int, nargs="+", default=[4], help="on slow links")
    parser.add_argument("--expert", nargs="+", default=[axis.value for axis in ExpertAxis], choices=list(ExpertAxis))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/dispatch.json"))
    arguments = parser.parse_args()
    plain = Asked(arguments.rounds, None, (), tuple(arguments.expert))
    limited = replace(plain, megabits=arguments.megabits, chunks=tuple(arguments.chunks))
    result: dict[str, Any] = {
        "rounds": arguments.rounds, "megabits": arguments.megabits, "load_before": os.getloadavg()[0],
        "cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version(),
        "shape": vars(SHAPE) | {"expert_width": WIDTH},
    }  # fmt: skip
    for dp, tp in ((2, 2), (2, 4)):
        rows = result[f"loopback {dp}x{tp}"] = table(play_world(dp, tp, plain))
        print_equal_devices(dp, tp, plain, rows)
    reason = slow_link.why_not()
    if reason is None:
        with slow_link.network(4) as namespaces:
            rows = table(play_world(2, 2, limited, namespaces))
        print_slow_link(rows, limited)
        result["slow link 2x2"] = rows
    else:
        print(f"\nno slow link: {reason}")
        result["no slow link"] = reason
    result["paper"] = paper_scale()
    print("\npaper's scale (t 8192, h 4608, bf16, tp 4, top-2 of 16): MB per rank, layer and forward pass")
    for key, megabytes in result["paper"].items():
        print(f"{key:14} {megabytes:8.1f}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:3] == ["--role", "rank"]:
        rank, dp, tp = (int(value) for value in sys.argv[3:6])
        play_rank(rank, dp, tp, Asked(**json.loads(sys.argv[6])), Path(sys.argv[7]))
    else:
        main()
