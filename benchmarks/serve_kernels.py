"""Linear layers of serving on a CPU: FP8, bf16 and fp32 weights, 1, 8 and 64 rows, beside torch's and a plain read.

    python benchmarks/serve_kernels.py [--threads 1] [--rounds 9] [--out benchmarks/results/serve_kernels.json]

Weights 2816 x 1024 (an expert's), enough of them that none is in a cache when its turn comes. The variants take turns;
the figure is the median over the rounds of GB/s of stored weights. Two clocks: `wall` and `cpu`, seconds of the
processor (all threads together) over the threads, which neighbours on a busy machine lengthen less. Also attention:
steps of sequences that decode, GB/s of the keys and values stored.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from skymoe.ops import fp8_matmul
from skymoe.ops.fp8 import quantize
from skymoe.ops.fp8_decode import kernel
from skymoe.ops.fp8_matmul import fp8_linear
from skymoe.ops.invariant import invariant_linear
from skymoe.ops.paged import PagedBatch, paged_attention
from skymoe.ops.paged_store import PagedStore
from skymoe.spec.quantization import Fp8Scheme

OUTPUTS, INPUTS = 2816, 1024
BYTES = 160 << 20  # of each format, beyond the third-level cache
ROWS = (1, 8, 64)


@dataclass
class Variant:
    """Something to time: how it is called once, and how many bytes that reads."""

    name: str
    run: Callable[[], object]
    bytes: int
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def over(weights: Sequence[Tensor], x: Tensor, linear: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
    """One pass over all `weights`."""

    def run() -> None:
        for weight in weights:
            linear(x, weight)

    return run


def through_memory(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """`fp8_linear` as it is without the kernel."""
    found, fp8_matmul.can_decode = fp8_matmul.can_decode, lambda *_: False
    try:
        return fp8_linear(x, codes, scale, Fp8Scheme.BLOCK)
    finally:
        fp8_matmul.can_decode = found


def linears() -> list[Variant]:
    """All formats and numbers of rows."""
    made: list[Variant] = []
    wide = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(0)) * 0.02
    codes, scale = quantize(wide, Fp8Scheme.BLOCK)
    for name, weight in (("fp32", wide), ("bf16", wide.bfloat16()), ("fp8", codes)):
        copies = [weight.clone() for _ in range(BYTES // weight.nbytes)]
        size = sum(copy.nbytes for copy in copies)
        for rows in ROWS:
            x = torch.randn(rows, INPUTS).to(torch.float32 if name == "fp32" else torch.bfloat16)
            ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"F.linear": F.linear, "invariant": invariant_linear}
            if name == "fp8":
                ways = {"through memory": lambda x, w: through_memory(x, w, scale)}
                if kernel() is not None:
                    ways["kernel"] = lambda x, w: fp8_linear(x, w, scale, Fp8Scheme.BLOCK)
            made += [Variant(f"{name} M={rows} {way}", over(copies, x, call), size) for way, call in ways.items()]
        if name == "fp32":
            made.append(Variant("read", lambda copies=copies: [copy.sum() for copy in copies], size))
    return made


def attentions() -> list[Variant]:
    """Steps of 1 and 16 sequences of 1000 tokens that decode, 16 heads on 4 of 64 numbers; read once: 1000 x 4 x 64."""
    made = []
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        for sequences in (1, 16):
            keys, values = (PagedStore(4, 63 * sequences, 16, 64, dtype) for _ in range(2))
            pages = [tuple(range(63 * i, 63 * i + 63)) for i in range(sequences)]
            batch = PagedBatch.of([(1, 999, some) for some in pages], 16)
            q, heads = torch.randn(sequences, 16, 64), tuple(head // 4 for head in range(16))
            call = lambda q=q, k=keys, v=values, b=batch, h=heads: paged_attention(q, k, v, b, h)  # noqa: E731
            made.append(Variant(f"attention {str(dtype)[6:]} U={sequences}", call, keys.num_bytes + values.num_bytes))
    return made


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serve_kernels.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    variants = [*linears(), *attentions()]
    for variant in variants:
        variant.run()
    load = [os.getloadavg()[0]]
    for _ in range(options.rounds):
        for variant in variants:
            wall, cpu = time.perf_counter(), time.process_time()
            variant.run()
            variant.cpu.append((time.process_time() - cpu) / options.threads)
            variant.wall.append(time.perf_counter() - wall)
    load.append(os.getloadavg()[0])
    rows = []
    for variant in variants:
        wall, cpu = (statistics.median(times) for times in (variant.wall, variant.cpu))
        row = {"name": variant.name, "wall_GB_s": variant.bytes / wall / 1e9, "cpu_GB_s": variant.bytes / cpu / 1e9}
        rows.append({**row, "wall_us": wall * 1e6, "cpu_us": cpu * 1e6})
        print(
            f"{variant.name:32s} {row['wall_GB_s']:6.2f} GB/s wall {row['cpu_GB_s']:6.2f} GB/s cpu {cpu * 1e6:10.0f} us"
        )
    facts = {"threads": options.threads, "rounds": options.rounds, "torch": torch.__version__, "load_average": load}
    options.out.write_text(json.dumps({**facts, "figures": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
