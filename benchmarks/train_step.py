"""Training throughput on this CPU: our step against transformers', beside the GEMM peak, and where the time goes.

    python benchmarks/train_step.py [--repeats 5] [--out benchmarks/results/train_step.json]

Three contenders train the demo's shapes (dense and 8 experts, top-2) on the same random tokens with the same
optimizer (fused AdamW) under the same bf16 autocast:

    skymoe        the step of `skymoe train`: chunked head and loss, grouped experts, kept memory
    reference     the same model with the experts as a plain loop
    transformers  LlamaForCausalLM / MixtralForCausalLM (eager and grouped_mm experts), its own loss

The rounds interleave the contenders, the medians are compared, and the routing is that of random router
weights: uneven, not force-balanced. MFU counts causal attention, forward and backward, over the
measured peak of a square bf16 matmul in the same process. A benchmark that cannot lose is worth nothing: transformers
is shown with its `eager` and its `grouped_mm` experts (`batched_mm` copies the weights of every token: tens of GB
here).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from skymoe.base.memory import keep_freed_memory
from skymoe.demo.recipes import DENSE, EXPERTS, FULL, TOP_K
from skymoe.model.batch import BatchInfo
from skymoe.model.init import initialize
from skymoe.model.transformer import Transformer
from skymoe.ops.balance import AuxLoss
from skymoe.ops.experts import ExpertsBackend
from skymoe.spec.flops import AttentionCount, flops_per_token
from skymoe.spec.model import Architecture, GateNormSpec, ModelSpec, MoESpec
from skymoe.spec.presets import preset
from skymoe.train.batches import MicroBatch, StepBatch
from skymoe.train.config import OptimizerConfig
from skymoe.train.objective import Objective, accumulate_gradients
from skymoe.train.optim import Optimizer
from skymoe.train.throughput import measure_gemm

Step = Callable[[], None]


def specs() -> dict[str, ModelSpec]:
    """The demo's two models."""
    dense = preset(DENSE)
    moe = MoESpec(num_experts=EXPERTS, top_k=TOP_K, ffn_size=dense.ffn_size, gate_norm=GateNormSpec())
    return {"dense": dense, "moe": replace(dense, architecture=Architecture.SKYMOE, moe=moe)}


def random_batch(spec: ModelSpec) -> StepBatch:
    """One global batch of random tokens in the demo's shape."""
    generator = torch.Generator().manual_seed(0)
    shape = (FULL.sequences, FULL.sequence_length)
    tokens = torch.randint(0, spec.vocab_size, shape, generator=generator)
    micro = MicroBatch(tokens, tokens.roll(-1, 1), BatchInfo(), tokens.numel())
    return StepBatch((micro,), tokens.numel(), tokens.numel(), shape[0])


def our_step(spec: ModelSpec, backend: ExpertsBackend) -> Step:
    """Forward, backward, clip and update as `skymoe train` does them."""
    model = initialize(Transformer(spec, experts=backend), 0)
    optimizer = Optimizer(model, OptimizerConfig())
    batch = random_batch(spec)
    objective = Objective(aux=AuxLoss.SKYWORK if spec.moe else AuxLoss.NONE, compute=torch.bfloat16)
    alpha_L = [0.01] * len(spec.moe_layer_ids)

    def step() -> None:
        accumulate_gradients(model, batch, objective, alpha_L)
        optimizer.update(1e-4, float(optimizer.gradient_norm()))

    return step


def transformers_step(spec: ModelSpec, experts: str | None) -> Step:
    """The same sizes as a transformers model trained the usual way."""
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    sizes = dict(
        vocab_size=spec.vocab_size, hidden_size=spec.hidden_size, intermediate_size=spec.ffn_size,
        num_hidden_layers=spec.num_layers, num_attention_heads=spec.num_heads, num_key_value_heads=spec.num_kv_heads,
        tie_word_embeddings=spec.tie_embeddings, max_position_embeddings=spec.max_position, use_cache=False,
    )  # fmt: skip
    if spec.moe is None:
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    else:
        config = MixtralConfig(**sizes, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K, output_router_logits=True)
        if experts is not None:
            config._experts_implementation = experts
        model = MixtralForCausalLM(config)
    model.train()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = random_batch(spec).micros[0].tokens_BT

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()

    return step


def contenders(kind: str, spec: ModelSpec) -> dict[str, Step]:
    """Steps to time for one model."""
    if kind == "dense":
        return {"skymoe": our_step(spec, ExpertsBackend.GROUPED), "transformers": transformers_step(spec, None)}
    peers = {f"transformers {name}": transformers_step(spec, name) for name in ("eager", "grouped_mm")}
    return {
        "skymoe": our_step(spec, ExpertsBackend.GROUPED),
        "reference": our_step(spec, ExpertsBackend.LOOP),
        **peers,
    }


def measure(steps: dict[str, Step], repeats: int) -> dict[str, list[float]]:
    """Seconds of every step, the contenders taking turns; one round to warm up is thrown away."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def largest_costs(step: Step, most: int = 8) -> list[tuple[str, float]]:
    """The operators with the largest share of one step's own CPU time."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return [(event.key, event.self_cpu_time_total / total) for event in events[:most]]


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/train_step.json"))
    parser.add_argument("--default-allocator", action="store_true", help="do not keep freed memory")
    arguments = parser.parse_args()
    kept = not arguments.default_allocator and keep_freed_memory()
    peak = max(measure_gemm(torch.bfloat16, torch.device("cpu")) for _ in range(5))
    threads = torch.get_num_threads()
    print(f"bf16 matmul peak {peak / 1e9:.0f} GFLOP/s on {threads} threads, freed memory kept: {kept}")
    result = {
        "peak_flops": peak, "threads": threads, "freed_memory_kept": kept, "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(), "models": {},
    }  # fmt: skip
    num_tokens = FULL.sequences * FULL.sequence_length
    for kind, spec in specs().items():
        flops = flops_per_token(spec, FULL.sequence_length, attention=AttentionCount.CAUSAL, backward=True).total
        steps = contenders(kind, spec)
        medians = {name: statistics.median(values) for name, values in measure(steps, arguments.repeats).items()}
        costs = largest_costs(steps["skymoe"])
        print(f"\n{kind}: {flops / 1e6:.1f} MFLOP a token, {num_tokens} tokens a step")
        for name, seconds in medians.items():
            rate = num_tokens / seconds
            print(f"  {name:24} {rate:9.0f} tok/s  MFU {rate * flops / peak:6.1%}  {seconds / medians['skymoe']:5.2f}x")
        print("  largest costs: " + ", ".join(f"{name} {share:.0%}" for name, share in costs))
        result["models"][kind] = {"seconds": medians, "tokens": num_tokens, "flops_per_token": flops, "costs": costs}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
