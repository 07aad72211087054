"""Time of one step of an inference engine: the laws of the price list (plan/cost/laws.py) with a few overheads.

A step runs `decode` sequences one token on, and prompt tokens beside them. Per layer, on the slowest GPU each time:

    projections       GEMM law over all tokens of the step, with the bytes of the weights
    attention         keys and values of every decoding sequence at the memory law's rate; FLOPs of prompts
    feed-forward      GEMM law; of E experts, B tokens with k choices touch E (1 - (1 - k/E)^B)
    two all-reduces   alpha + 2 (t-1)/t bytes / bus
    norms, residuals  8 passes over the tokens

then the head, the gathering of logits and what the engine itself costs. Experts that are whole are a lottery: the
fullest of t GPUs has about sqrt(2 ln t) standard deviations more than the mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from skymoe.plan.cost.laws import Kernels
from skymoe.plan.hardware.gpu import Gpu, Link, Precision
from skymoe.plan.serve.engine import Engine
from skymoe.plan.serve.model import Served
from skymoe.plan.serve.shares import Shares
from skymoe.plan.shape import FfnShape, LayerShape

_PASSES = 8  # over the hidden state in a layer: two norms, two residuals, activation, rotary
_PARTS = ("weights", "attention", "reduce", "head", "engine")


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a step works on.

    Attributes:
        decode: sequences that get one token.
        context: tokens that each of them looks back on.
        prefill: prompt tokens.
        prefill_context: tokens that each of those looks back on, on average.
        done: prompts that end in the step, whose last token passes the head.
    """

    decode: float = 0.0
    context: float = 0.0
    prefill: float = 0.0
    prefill_context: float = 0.0
    done: float = 0.0

    @property
    def tokens(self) -> float:
        """In all."""
        return self.decode + self.prefill


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where a step runs.

    Attributes:
        served, gpus, shares, engine: model, tensor-parallel GPUs, their shares, what the engine costs.
        layers: of each kind that these GPUs have; all unless they are one stage of a pipeline.
        head: whether they have the head.
        is_stage: whether they are one stage of several.
    """

    served: Served
    gpus: tuple[Gpu, ...]
    shares: Shares
    engine: Engine
    layers: tuple[tuple[LayerShape, float], ...]
    head: bool = True
    is_stage: bool = False

    @property
    def link(self) -> Link:
        """The slowest one between the GPUs, as the engine uses it."""
        inside = all(len(self.gpus) <= gpu.gpus_per_node for gpu in self.gpus)
        links = [gpu.node if inside else gpu.network for gpu in self.gpus]
        return Link(
            latency_s=max(link.latency_s for link in links) * self.engine.latency,
            bandwidth=min(link.bandwidth for link in links) * self.engine.bus,
        )

    @property
    def compute(self) -> Precision:
        """What is multiplied."""
        narrow = self.served.compute.weight_bytes < 2
        return Precision.BF16 if narrow and self.engine.weight_only else self.served.compute


def step_s(setting: Setting, load: Load) -> dict[str, float]:
    """Seconds of one step by cause; their sum is the step."""
    parts = dict.fromkeys(_PARTS, 0.0)
    for layer, count in setting.layers:
        weights, attention = _attention(setting, layer, load)
        parts["weights"] += count * (weights + _ffn(setting, layer.ffn, load) + _passes(setting, load))
        parts["attention"] += count * attention
        parts["reduce"] += count * 2 * _reduce(setting, load)
    engine = setting.engine
    num_layers = sum(count for _, count in setting.layers)
    gaps = num_layers * engine.layer_us * max(engine.kernels(gpu.name).layer for gpu in setting.gpus)
    parts["engine"] = (engine.step_us + gaps) * 1e-6
    each = engine.sequence_us + (engine.stage_sequence_us if setting.is_stage else 0.0)
    parts["engine"] += (load.decode + load.done) * each * 1e-6
    if setting.head:
        parts["head"] = _head(setting, load)
    return parts


def total_s(setting: Setting, load: Load) -> float:
    """Seconds of one step."""
    return sum(step_s(setting, load).values())


def _gemm(setting: Setting, gpu: Gpu, flops: float, num_bytes: float) -> float:
    """The GEMM law as the engine reaches it, launch aside (`layer_us`)."""
    engine, own = setting.engine, setting.engine.kernels(gpu.name)
    gemm, memory = engine.gemm * own.gemm, engine.memory * own.memory
    if engine.weight_only and setting.served.weight_bytes < 2:
        gemm, memory = gemm * engine.narrow_gemm, memory * engine.narrow_memory
    return Kernels.of_engine(gpu, setting.compute, gemm=gemm, memory=memory).product(flops, num_bytes)


def _attention(setting: Setting, layer: LayerShape, load: Load) -> tuple[float, float]:
    """Seconds of the projections, and of the attention itself, each on its slowest GPU."""
    served, shares, engine = setting.served, setting.shares, setting.engine
    window = layer.attention.window
    context = load.context if window is None else min(load.context, window)
    pairs = load.prefill_context if window is None else min(load.prefill_context, window)
    a, projections, scores = layer.attention, 0.0, 0.0
    for g, gpu in enumerate(setting.gpus):
        elements = shares.heads[g] * served.query_elements + shares.kv_heads[g] * served.kv_elements
        elements += served.common_elements
        projections = max(projections, _gemm(setting, gpu, 2 * load.tokens * elements, elements * served.weight_bytes))
        token = shares.kv_heads[g] * served.kv_head_bytes + served.common_kv_bytes
        width = a.kv_rank * 2 if a.kv_rank else a.head_dim + a.value_dim
        flops = 2 * load.decode * context * shares.heads[g] * width  # matters for latent attention only
        memory = engine.kv_memory * engine.kernels(gpu.name).memory
        kernels = Kernels.of_engine(gpu, Precision.BF16, memory=memory)
        prompt = 2 * load.prefill * pairs * shares.heads[g] * (a.head_dim + a.value_dim)
        decode = kernels.attend(flops, load.decode * context * token)
        scores = max(scores, decode + kernels.attend(prompt, 0.0))
    return projections, scores


def touched(num_experts: int, top_k: int, tokens: float) -> float:
    """Experts that at least one of `tokens` chooses, on average: E (1 - (1 - k/E)^B)."""
    missed: float = (1.0 - top_k / num_experts) ** max(tokens, 1.0)
    return num_experts * (1.0 - missed)


def _ffn(setting: Setting, ffn: FfnShape, load: Load) -> float:
    """Seconds of a feed-forward on its slowest GPU."""
    served, shares = setting.served, setting.shares
    width, slowest = served.shape.hidden_size, 0.0
    widest = served.dense_ffn
    for g, gpu in enumerate(setting.gpus):
        if not ffn.is_moe:
            assert widest is not None
            columns = (shares.dense_columns if served.expert_ffn else shares.columns)[g] * ffn.inner / widest.inner
            elements = ffn.matrices * width * columns
            slowest = max(slowest, _gemm(setting, gpu, 2 * load.tokens * elements, elements * served.weight_bytes))
            continue
        one = ffn.matrices * width * shares.columns[g]
        used, choices = _expert_load(ffn, shares, g, load.tokens)
        shared = ffn.matrices * width * shares.shared_columns[g]
        time = _gemm(setting, gpu, 2 * choices * one, used * one * served.weight_bytes)
        time += _gemm(setting, gpu, 2 * load.tokens * shared, shared * served.weight_bytes) if shared else 0.0
        slowest = max(slowest, time)
    return slowest


def _expert_load(ffn: FfnShape, shares: Shares, gpu: int, tokens: float) -> tuple[float, float]:
    """Experts that are read on a GPU and choices that it computes: the mean; near the worst of whole ones."""
    share = touched(ffn.num_experts, ffn.top_k, tokens) / ffn.num_experts
    held, choices = shares.experts[gpu], tokens * ffn.top_k
    if held == ffn.num_experts:
        return held * share, choices
    deviations = math.sqrt(2.0 * math.log(max(2, shares.num_gpus)))
    part = held / ffn.num_experts
    used = min(float(held), held * share + deviations * math.sqrt(held * share * (1.0 - share)))
    return used, min(
        tokens * min(ffn.top_k, held), choices * part + deviations * math.sqrt(choices * part * (1 - part))
    )


def _passes(setting: Setting, load: Load) -> float:
    """Seconds of norms and residuals; every GPU does them all."""
    num_bytes = _PASSES * 2 * load.tokens * setting.served.shape.hidden_size
    return max(Kernels.of_engine(gpu, setting.compute).memory(num_bytes, 0) for gpu in setting.gpus)


def _reduce(setting: Setting, load: Load) -> float:
    """Seconds of an all-reduce of the step's tokens."""
    ranks = len(setting.gpus)
    if ranks == 1:
        return 0.0
    num_bytes = 2.0 * load.tokens * setting.served.shape.hidden_size
    return setting.link.latency_s + 2 * (ranks - 1) / ranks * num_bytes / setting.link.bandwidth


def _head(setting: Setting, load: Load) -> float:
    """Seconds of the head, and of bringing the logits together."""
    served, shares, ranks = setting.served, setting.shares, len(setting.gpus)
    tokens, slowest = load.decode + load.done, 0.0
    for g, gpu in enumerate(setting.gpus):
        elements = served.shape.hidden_size * shares.rows[g]
        read = elements * served.head_bytes + 4 * tokens * shares.rows[g]
        kernels = Kernels.of_engine(gpu, Precision.BF16, gemm=setting.engine.gemm)
        slowest = max(slowest, kernels.product(2 * tokens * elements, read))
    if ranks == 1:
        return slowest
    logits = 2.0 * tokens * served.shape.vocab_size * (ranks - 1) / ranks
    return slowest + setting.link.latency_s + logits / setting.link.bandwidth


def settings(
    served: Served, gpus: Sequence[Gpu], shares: Shares, engine: Engine, *, parts: int = 1
) -> tuple[Setting, ...]:
    """One setting, or `parts` equal stages of a pipeline over equal groups of GPUs; the last one has the head."""
    kinds = tuple((layer, count / parts) for layer, count in served.kinds)
    return tuple(
        Setting(
            served=served,
            gpus=tuple(gpus),
            shares=shares,
            engine=engine,
            layers=kinds,
            head=stage == parts - 1,
            is_stage=parts > 1,
        )
        for stage in range(parts)
    )
