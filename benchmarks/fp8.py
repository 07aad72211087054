"""What FP8 weights cost on a CPU: encoding, decoding, scales and the audit, beside torch's own casts.

    python benchmarks/fp8.py [--threads 1] [--rounds 7]

One matrix of Mixtral 8x7B's experts (14336 x 4096, bfloat16: larger than any cache). The variants take turns; of each
the fastest round counts, in seconds of the processor (all threads together), which a busy neighbour does not lengthen
much. GB/s are of the bfloat16 side. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch

from skymoe.ops.fp8 import decode_e4m3, dequantize, encode_e4m3, encode_scaled, largest, quantize, rounding_error
from skymoe.spec.quantization import Fp8Scheme

ROWS, COLUMNS = 14336, 4096


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    weight = (torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    wide = weight.float()
    variants: dict[str, Callable[[], object]] = {
        "torch cast, fp32 -> e4m3": lambda: wide.to(torch.float8_e4m3fn),
        "encode_e4m3, fp32 -> e4m3, saturating": lambda: encode_e4m3(wide),
    }
    for scheme in Fp8Scheme:
        codes, scale = quantize(weight, scheme)
        both = {"codes": codes, "scale": scale, "scheme": scheme}
        variants |= {
            f"{scheme}: largest of each group": lambda scheme=scheme: largest(weight, scheme),
            f"{scheme}: encode": lambda scale=scale, scheme=scheme: encode_scaled(weight, scale, scheme),
            f"{scheme}: decode to bf16": lambda b=both: dequantize(b["codes"], b["scale"], b["scheme"]),
            f"{scheme}: audit": lambda b=both: rounding_error(weight, b["codes"], b["scale"], b["scheme"]),
        }
    variants["torch cast, e4m3 -> bf16"] = lambda: codes.to(torch.bfloat16)
    variants["decode_e4m3, e4m3 -> bf16"] = lambda: decode_e4m3(codes, torch.bfloat16)
    best = dict.fromkeys(variants, float("inf"))
    for _ in range(options.rounds):
        for name, variant in variants.items():
            start = time.process_time()
            variant()
            best[name] = min(best[name], time.process_time() - start)
    figures = {name: round(2 * weight.numel() / seconds / 1e9, 2) for name, seconds in best.items()}
    print(json.dumps({"threads": options.threads, "bf16_GB_per_cpu_second": figures}, indent=2))


if __name__ == "__main__":
    main()
