"""The request with nothing left open: presets, the method's own defaults and the parent decide. No torch.

Notation of the virtual groups (He et al. 2024): a dense feed-forward of width F is cut into G shards of width F/G; E
experts hold each shard, so there are n = E G experts; a token uses T = top_k of them. Of m shared shards, G - m are
routed, and n = E (G - m).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from skymoe.base.errors import ConfigError
from skymoe.spec.model import GateNormSpec, ModelSpec, MoESpec
from skymoe.upcycle.config import PRESETS, Method, Rest, Shared, UpcycleConfig
from skymoe.upcycle.layers import moe_layers
from skymoe.upcycle.parents import check_parents

DEFAULT_EXPERTS, DEFAULT_TOP_K, DEFAULT_GRANULARITY, DEFAULT_EXPANSION = 8, 2, 8, 8
CLONE_NOISE = 0.01  # of the routers of copies, where the result is not exact anyway


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """What will be built.

    Attributes:
        method, shared: as asked.
        moe: the experts and the gate of the new layers; the shared expert's width is that asked for, 0 without one.
        layers: which layers are MoE; None means all.
        shards: how many experts make one whole feed-forward: G - m in virtual groups, n in a partition, else 1.
        shared_shards: m.
        gate_up_scale, down_scale: factors of the routed experts' matrices.
        assign: source of each expert; empty unless `specialists`.
        rest: where all other tensors come from.
        parent_experts, parent_top_k: `duplicate`: of the parent.
        router_noise: `duplicate`: on the router rows of the copies, relative to the deviation of all rows.
    """

    method: Method
    moe: MoESpec
    layers: tuple[int, ...] | None
    shared: Shared = Shared.NONE
    shards: int = 1
    shared_shards: int = 0
    gate_up_scale: float = 1.0
    down_scale: float = 1.0
    assign: tuple[int, ...] = ()
    rest: Rest = Rest.BASE
    parent_experts: int = 0
    parent_top_k: int = 0
    router_noise: float = 0.0

    @property
    def clones(self) -> float:
        """`duplicate`: how many times the parent's experts."""
        return self.moe.num_experts / self.parent_experts

    @property
    def router_rows(self) -> int:
        """How many different rows a new router has: the experts of a virtual group share one."""
        return self.moe.num_experts // self.shards if self.method is Method.VIRTUAL_GROUP else self.moe.num_experts


def draw_blueprint(config: UpcycleConfig, specs: Sequence[ModelSpec]) -> Blueprint:
    """Everything that follows from the request and the specs of the sources.

    Raises:
        ConfigError: it cannot be built; the message says what could.
    """
    check_parents(config, specs)
    base = specs[0]
    match config.method:
        case Method.DUPLICATE:
            return _duplicate(config, base)
        case Method.VIRTUAL_GROUP:
            return _virtual_group(config, base)
        case Method.PARTITION:
            return _partition(config, base)
        case Method.SPECIALISTS:
            return _specialists(config, base)
        case Method.COPY | Method.DROP | Method.NOISE:
            return _whole(config, base, experts=_experts(config) or DEFAULT_EXPERTS)


def _whole(config: UpcycleConfig, base: ModelSpec, *, experts: int, assign: tuple[int, ...] = ()) -> Blueprint:
    """Every expert is as wide as the dense feed-forward."""
    shared_ffn_size = base.ffn_size if config.shared is Shared.ZERO_ROUTED else 0
    return Blueprint(
        method=config.method,
        moe=_moe(config, experts, _top_k(config) or DEFAULT_TOP_K, base.ffn_size, shared_ffn_size),
        layers=moe_layers(config, base.num_layers),
        shared=config.shared,
        assign=assign,
        rest=config.rest,
    )


def _specialists(config: UpcycleConfig, base: ModelSpec) -> Blueprint:
    count = len(config.sources)
    named = len(config.assign) if config.assign else None
    experts = config.experts or named or _experts(config) or DEFAULT_EXPERTS
    assign = config.assign or tuple(expert % count for expert in range(experts))
    if len(assign) != experts:
        raise ConfigError(f"assign names a source for {len(assign)} experts, experts is {experts}")
    if not all(0 <= source < count for source in assign):
        wrong = next(source for source in assign if not 0 <= source < count)
        raise ConfigError(
            f"assign names source {wrong}, there are {count}", hint=f"sources count from 0 to {count - 1}"
        )
    unused = sorted(set(range(count)) - set(assign))
    if unused and not (config.rest is Rest.AVERAGE or unused == [0]):
        what = f"no expert comes from source {unused[0]}"
        hint = f"at least {count} experts" if config.assign is None else "name it in assign, or leave it out"
        raise ConfigError(what, where=config.sources[unused[0]], hint=hint)
    return _whole(config, base, experts=experts, assign=assign)


def _virtual_group(config: UpcycleConfig, base: ModelSpec) -> Blueprint:
    total = config.granularity or DEFAULT_GRANULARITY
    shared = config.shared_shards if config.shared is Shared.SPLIT else 0
    routed = total - shared
    if routed < 1:
        raise ConfigError(f"shared_shards is {shared} of {total} shards: none is left to route", hint="granularity=8")
    width = _part(base.ffn_size, total, "granularity")
    experts = _experts(config)
    if config.expansion is None and experts is not None and experts % routed:
        what = f"experts is {experts}, no multiple of the {routed} routed shards"
        raise ConfigError(what, hint=f"--experts {math.ceil(experts / routed) * routed}, or give --expansion")
    expansion = config.expansion or (DEFAULT_EXPANSION if experts is None else experts // routed)
    if config.experts is not None and config.experts != expansion * routed:
        raise ConfigError(f"experts is {config.experts}, but expansion x shards is {expansion} x {routed}")
    shared_ffn_size = {Shared.SPLIT: shared * width, Shared.ZERO_ROUTED: base.ffn_size, Shared.NONE: 0}[config.shared]
    moe = _moe(config, expansion * routed, _top_k(config) or routed, width, shared_ffn_size)
    gate_up_scale, down_scale = _group_scales(config, moe, routed, expansion)
    return Blueprint(
        method=config.method,
        moe=moe,
        layers=moe_layers(config, base.num_layers),
        shared=config.shared,
        shards=routed,
        shared_shards=shared,
        gate_up_scale=gate_up_scale,
        down_scale=down_scale,
    )


def _group_scales(config: UpcycleConfig, moe: MoESpec, shards: int, expansion: int) -> tuple[float, float]:
    """Factors of (gate and up, down)."""
    if isinstance(config.weight_scale, float):
        return 1.0, config.weight_scale
    if config.weight_scale == "exact":
        return 1.0, float(shards)
    if config.shared is Shared.SPLIT:
        raise ConfigError("weight_scale=he2024 is not defined for shared=split", hint="weight_scale=exact")
    # He et al. 2024: s = E G^2 / T for softmax, then top-k; G with renormalization. Three matrices in a row of SwiGLU.
    factor = shards if moe.norm_topk else expansion * shards**2 / moe.top_k
    return factor ** (1 / 3), factor ** (1 / 3)


def _partition(config: UpcycleConfig, base: ModelSpec) -> Blueprint:
    experts = _experts(config) or DEFAULT_EXPERTS
    width = _part(base.ffn_size, experts, "experts")
    shared_ffn_size = base.ffn_size if config.shared is Shared.ZERO_ROUTED else 0
    moe = _moe(config, experts, _top_k(config) or DEFAULT_TOP_K, width, shared_ffn_size)
    scale = config.output_scale or (experts if moe.norm_topk else experts**2 / moe.top_k)
    layers = moe_layers(config, base.num_layers)
    return Blueprint(
        method=config.method, moe=moe, layers=layers, shared=config.shared, shards=experts, down_scale=float(scale)
    )  # fmt: skip


def _duplicate(config: UpcycleConfig, base: ModelSpec) -> Blueprint:
    old = base.moe
    assert old is not None  # `check_parents`
    experts = _experts(config) or 2 * old.num_experts
    if experts <= old.num_experts:
        what = f"experts is {experts}, the model has {old.num_experts} already"
        raise ConfigError(what, where=config.sources[0], hint=f"--experts {2 * old.num_experts}")
    whole, left = divmod(experts, old.num_experts)
    top_k = _top_k(config) or old.top_k * (1 if left else whole)
    _refuse_top_k(top_k, experts)
    exact = not left and top_k == whole * old.top_k
    noise = config.router_noise if config.router_noise is not None else (0.0 if exact else CLONE_NOISE)
    norm = _cloned_norm(old.gate_norm, old.num_experts, experts) if old.gate_norm else None
    moe = MoESpec(
        num_experts=experts, top_k=top_k, ffn_size=old.ffn_size, gate_norm=norm, norm_topk=old.norm_topk,
        expert_bias=old.expert_bias, shared_ffn_size=old.shared_ffn_size,
    )  # fmt: skip
    return Blueprint(
        method=config.method,
        moe=moe,
        layers=base.moe_layers,
        parent_experts=old.num_experts,
        parent_top_k=old.top_k,
        router_noise=noise,
    )


def _cloned_norm(norm: GateNormSpec, old: int, new: int) -> GateNormSpec:
    """The normalization that gives cloned logits the values they had.

    With f clones of each logit the sum of squares grows f times, and the variance (f S) / (f n - 1) is not S / (n - 1).
    lambda and eps times sqrt(f (n - 1) / (f n - 1)) make up for that; the population deviation needs nothing.
    """
    if norm.ddof == 0 or new % old:
        return norm
    factor = math.sqrt(new / old * (old - 1) / (new - 1))
    return GateNormSpec(
        scale=norm.scale * factor, ddof=norm.ddof, eps=norm.eps * factor, subtract_mean=norm.subtract_mean
    )  # fmt: skip


def _moe(config: UpcycleConfig, experts: int, top_k: int, ffn_size: int, shared_ffn_size: int) -> MoESpec:
    _refuse_top_k(top_k, experts)
    norm = None
    if config.wants_gate_norm:
        norm = GateNormSpec(scale=config.gate_scale, ddof=config.gate_ddof, eps=config.gate_eps)
    return MoESpec(
        num_experts=experts, top_k=top_k, ffn_size=ffn_size, gate_norm=norm, norm_topk=config.norm_topk,
        shared_ffn_size=shared_ffn_size,
    )  # fmt: skip


def _experts(config: UpcycleConfig) -> int | None:
    return config.experts if config.experts is not None else PRESETS[config.preset].experts


def _top_k(config: UpcycleConfig) -> int | None:
    return config.top_k if config.top_k is not None else PRESETS[config.preset].top_k


def _refuse_top_k(top_k: int, experts: int) -> None:
    if top_k > experts:
        raise ConfigError(f"top_k is {top_k}, but there are only {experts} experts", hint=f"--top-k {experts} or less")


def _part(ffn_size: int, count: int, name: str) -> int:
    """`ffn_size` / `count`; refused with the divisors nearby when that is no whole number."""
    if ffn_size % count:
        divisors = [d for d in range(1, min(ffn_size, 4 * count) + 1) if ffn_size % d == 0]
        near = sorted(sorted(divisors, key=lambda d: abs(d - count))[:4])
        what = f"{name} is {count}, which does not divide the {ffn_size} neurons of the feed-forward"
        raise ConfigError(what, hint=f"{name}={near[0]}" if len(near) == 1 else f"one of {', '.join(map(str, near))}")
    return ffn_size // count
