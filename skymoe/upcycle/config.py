"""What the user asks of `skymoe upcycle`: the one place of all options and defaults.

A preset fills in what is not given; the method decides what is still open then (`blueprint.py`). An option that the
chosen method does not read is refused, not ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from skymoe.base.config import Config
from skymoe.base.dtype import DType


class Method(StrEnum):
    """How the experts are made. docs/upcycling.md has the sources and when the result is exactly the parent."""

    COPY = "copy"  # every expert is the dense feed-forward
    DROP = "drop"  # a copy with a share of its neurons drawn anew
    NOISE = "noise"  # a copy with noise on a share of its neurons
    VIRTUAL_GROUP = "virtual_group"  # the feed-forward cut into G shards, E experts of each shard
    SPECIALISTS = "specialists"  # feed-forwards of several models
    PARTITION = "partition"  # the neurons of one feed-forward dealt out to n experts
    DUPLICATE = "duplicate"  # a mixture of experts becomes a larger one


class Preset(StrEnum):
    """Named starting points; what is given beside them wins."""

    SKYWORK = "skywork"  # 16 experts, top-2, gate normalization: Skywork-MoE
    PORTABLE = "portable"  # 8 experts, top-2, none: loads as Mixtral, Qwen2-MoE or Qwen3-MoE everywhere


class TargetFormat(StrEnum):
    """Which architecture the output directory is written as."""

    AUTO = "auto"  # the native one of transformers that carries it exactly, else skymoe
    MIXTRAL = "mixtral"
    QWEN2_MOE = "qwen2_moe"
    QWEN3_MOE = "qwen3_moe"
    SKYMOE = "skymoe"
    SKYWORK = "skywork"  # Skywork-MoE's names and fields; for Llama-shaped parents


class DropIndices(StrEnum):
    """Which neurons are changed in the three matrices of one expert."""

    SHARED = "shared"  # the same: a neuron is kept or changed as a whole
    PER_MATRIX = "per_matrix"  # drawn for each matrix, as the released code of Drop-Upcycling does


class Rest(StrEnum):
    """Where specialists take everything from that is no expert."""

    BASE = "base"  # the first source
    AVERAGE = "average"  # the mean over all sources: Branch-Train-MiX


class Order(StrEnum):
    """How `partition` deals the neurons out."""

    RANDOM = "random"
    CONTIGUOUS = "contiguous"


class Shared(StrEnum):
    """An expert that every token uses, beside the routed ones."""

    NONE = "none"
    ZERO_ROUTED = "zero_routed"  # it is the dense feed-forward; the routed experts start with a zero down projection
    SPLIT = "split"  # it has `shared_shards` of the G shards; virtual groups share the others


class RouterInit(StrEnum):
    """How the rows of a new router begin. Never zero: see docs/upcycling.md."""

    NORMAL = "normal"
    UNIFORM = "uniform"
    CENTROIDS = "centroids"  # of the hidden states of a text, by k-means on the sphere


class PresetValues(NamedTuple):
    """What a preset fills in."""

    experts: int | None = None
    top_k: int | None = None
    gate_norm: bool | None = None


PRESETS: Mapping[Preset | None, PresetValues] = {
    None: PresetValues(),
    Preset.SKYWORK: PresetValues(experts=16, top_k=2, gate_norm=True),
    Preset.PORTABLE: PresetValues(experts=8, top_k=2, gate_norm=False),
}
_DROP, _GROUPS = (Method.DROP, Method.NOISE), (Method.VIRTUAL_GROUP,)
_READ_BY: Mapping[str, tuple[Method, ...]] = {
    "ratio": (Method.DROP,), "drop_indices": _DROP, "noise_share": (Method.NOISE,), "noise_std": (Method.NOISE,),
    "granularity": _GROUPS, "expansion": _GROUPS, "weight_scale": _GROUPS, "shared_shards": _GROUPS,
    "assign": (Method.SPECIALISTS,), "rest": (Method.SPECIALISTS,),
    "partition_order": (Method.PARTITION,), "output_scale": (Method.PARTITION,), "router_noise": (Method.DUPLICATE,),
}  # fmt: skip
_OF_GATE_NORM = ("gate_scale", "gate_ddof", "gate_eps")
_OF_NEW_ROUTERS = (
    "layers", "layer_interval", "last_layers", "router_init", "router_std", "centroid_text", "shared", "norm_topk",
    *_OF_GATE_NORM,
)  # fmt: skip


class UpcycleConfig(Config):
    """One conversion.

    Attributes:
        sources: the model, a Hugging Face directory; several for `specialists`, the first one is the base.
        out: the directory to create.
        preset: fills in experts, top_k and gate_norm where they are not given.
        method: how the experts are made.
        experts, top_k: experts per MoE layer, and how many a token uses. None: 8 and 2, unless the method says
            otherwise (`virtual_group`: E G and G; `duplicate`: twice the parent's, and as many times its top_k).
        ratio: `drop`: share of the neurons of each expert that are drawn anew, N(mean, deviation) of what they replace.
        drop_indices: `drop`, `noise`: one set of neurons per expert, or one per matrix.
        noise_share, noise_std: `noise`: share of the neurons, and deviation relative to that of the matrix.
        granularity, expansion: `virtual_group`: G shards per feed-forward, E experts of each shard.
        weight_scale: `virtual_group`: `exact` multiplies `down` so that renormalized weights give the dense output;
            `he2024` multiplies all three matrices by s^(1/3) as Megatron does; a number multiplies `down`.
        assign: `specialists`: number of the source of each expert; None goes round.
        rest: `specialists`: where all other tensors come from.
        partition_order: `partition`: neurons dealt out at random, or in order.
        output_scale: `partition`: factor of `down`; None is n (or n^2/k without renormalization): with equal combine
            weights the mean over all choices of experts is the dense output.
        shared, shared_shards: a shared expert; how many of the G shards it has (`split`).
        layers: ids of the layers that become MoE; None means all.
        layer_interval: every so many layers, the last of each group (Qwen's decoder_sparse_step).
        last_layers: only so many layers at the end.
        gate_norm: gating logit normalization (Skywork-MoE Eq. 6). None is the preset's, else off; with `duplicate` it
            is the parent's.
        gate_scale, gate_ddof, gate_eps: its lambda, degrees of freedom of the deviation, and guard.
        norm_topk: renormalize the chosen probabilities; without it only few methods are exact.
        router_init: how new routers begin.
        router_std: standard deviation of the new router weights. Never zero: a zero router sends every token to the
            same experts, and the balance loss has no gradient to change that.
        router_noise: `duplicate`: noise on the router rows of the copies, relative to the deviation of all rows. None
            is 0 where the result is exact, else 0.01, so that a choice between clones is not a tie.
        centroid_text: a UTF-8 text file whose hidden states are clustered.
        centroid_tokens: most tokens of it that are read.
        format: architecture of the output.
        dtype: of the output's weights; None keeps the source's.
        seed: of everything random, and of the receipt's tokens.
        receipt_tokens: length of each of the receipt's sequences (docs/receipt.md); 0 writes no measurements.
        max_shard_bytes: most bytes in one weight file.
        overwrite: replace an existing output directory.
        dry_run: plan only; nothing is written.
    """

    sources: tuple[Path, ...] = Field(min_length=1, max_length=1024)
    out: Path
    preset: Preset | None = None
    method: Method = Method.COPY
    experts: int | None = Field(default=None, ge=2, le=65536)
    top_k: int | None = Field(default=None, ge=1)
    ratio: float = Field(default=0.5, gt=0, le=1)
    drop_indices: DropIndices = DropIndices.SHARED
    noise_share: float = Field(default=0.5, gt=0, le=1)
    noise_std: float = Field(default=0.1, gt=0, le=100)
    granularity: int | None = Field(default=None, ge=1, le=65536)
    expansion: int | None = Field(default=None, ge=1, le=65536)
    weight_scale: Literal["exact", "he2024"] | float = "exact"
    assign: tuple[int, ...] | None = Field(default=None, min_length=2, max_length=65536)
    rest: Rest = Rest.BASE
    partition_order: Order = Order.RANDOM
    output_scale: float | None = Field(default=None, gt=0)
    shared: Shared = Shared.NONE
    shared_shards: int = Field(default=1, ge=1)
    layers: tuple[int, ...] | None = None
    layer_interval: int | None = Field(default=None, ge=1)
    last_layers: int | None = Field(default=None, ge=1)
    gate_norm: bool | None = None
    gate_scale: float = Field(default=1.0, gt=0)
    gate_ddof: int = Field(default=1, ge=0, le=1)
    gate_eps: float = Field(default=1e-6, ge=0, lt=1)
    norm_topk: bool = True
    router_init: RouterInit = RouterInit.NORMAL
    router_std: float = Field(default=0.02, gt=0, le=10)
    router_noise: float | None = Field(default=None, ge=0, le=10)
    centroid_text: Path | None = None
    centroid_tokens: int = Field(default=8192, ge=16, le=10_000_000)
    format: TargetFormat = TargetFormat.AUTO
    dtype: DType | None = None
    seed: int = Field(default=0, ge=0)
    receipt_tokens: int = Field(default=64, ge=0, le=65536)
    max_shard_bytes: int = Field(default=5_000_000_000, ge=1_000)
    overwrite: bool = False
    dry_run: bool = False

    @property
    def wants_gate_norm(self) -> bool:
        """Whether new gates are normalized: as asked, else as the preset has it, else not."""
        return bool(PRESETS[self.preset].gate_norm if self.gate_norm is None else self.gate_norm)

    def told(self) -> dict[str, Any]:
        """The options that this method reads, as JSON data: all that is needed to do it again, and no path."""
        unread = {name for name, methods in _READ_BY.items() if self.method not in methods}
        unread |= set(_OF_NEW_ROUTERS) if self.method is Method.DUPLICATE else set()
        unread |= {"centroid_tokens"} if self.centroid_text is None else set()
        places = {"sources", "out", "overwrite", "dry_run", "max_shard_bytes", "centroid_text"}
        return self.model_dump(mode="json", exclude=unread | places, exclude_none=True)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.layers is not None and (not self.layers or list(self.layers) != sorted(set(self.layers))):
            raise ValueError("layers must be ascending layer ids, at least one")
        if sum(given is not None for given in (self.layers, self.layer_interval, self.last_layers)) > 1:
            raise ValueError("give one of layers, layer_interval and last_layers")
        if self.dtype is not None and self.dtype not in (DType.FLOAT32, DType.BFLOAT16, DType.FLOAT16):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {self.dtype}")
        if isinstance(self.weight_scale, float) and not self.weight_scale > 0:
            raise ValueError(f"weight_scale must be exact, he2024 or a positive number, got {self.weight_scale}")
        return self

    @model_validator(mode="after")
    def _nothing_unread(self) -> Self:
        changed = {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}
        for name in sorted(changed & _READ_BY.keys()):
            if self.method not in _READ_BY[name]:
                raise ValueError(f"{name} belongs to method {' or '.join(_READ_BY[name])}, not to {self.method}")
        unread = sorted(changed & set(_OF_NEW_ROUTERS)) if self.method is Method.DUPLICATE else []
        if unread:
            raise ValueError(f"{unread[0]} is the parent's where method is duplicate; it cannot be chosen")
        if self.method is not Method.DUPLICATE and not self.wants_gate_norm and changed & set(_OF_GATE_NORM):
            raise ValueError(f"{min(changed & set(_OF_GATE_NORM))} belongs to gate_norm, which is off")
        if "shared_shards" in changed and self.shared is not Shared.SPLIT:
            raise ValueError("shared_shards belongs to shared=split")
        if (self.router_init is RouterInit.CENTROIDS) != (self.centroid_text is not None):
            raise ValueError("router_init=centroids and centroid_text=FILE belong together")
        if self.shared is Shared.SPLIT and self.method is not Method.VIRTUAL_GROUP:
            raise ValueError("shared=split cuts the feed-forward into shards: method must be virtual_group")
        return self
