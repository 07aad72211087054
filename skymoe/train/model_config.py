"""The `model` section of a training recipe: an existing directory, a preset, or a description to start afresh from."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from skymoe.base.config import Config
from skymoe.base.errors import ConfigError
from skymoe.spec.model import Architecture, GateNormSpec, ModelSpec, MoESpec, QkNorm, RopeScaling, RopeSpec


class GateNormConfig(Config):
    """Gating logit normalization (Eq. 6); see `GateNormSpec`. The released form is `eps: 0, subtract_mean: false`."""

    scale: float = Field(default=1.0, gt=0)
    ddof: Literal[0, 1] = 1
    eps: float = Field(default=1e-6, ge=0, lt=1)
    subtract_mean: bool = True

    def to_spec(self) -> GateNormSpec:
        """The same as a spec."""
        return GateNormSpec(**self.model_dump())


class RopeConfig(Config):
    """Rotary embedding and its scaling; see `RopeSpec` for what each key means and to which variant it belongs."""

    theta: float = Field(default=10000.0, gt=0)
    scaling: RopeScaling = RopeScaling.NONE
    factor: float = Field(default=1.0, ge=1)
    original_max_position: int | None = Field(default=None, ge=1)
    low_freq_factor: float = Field(default=1.0, gt=0)
    high_freq_factor: float = Field(default=4.0, gt=0)
    beta_fast: float = Field(default=32.0, gt=0)
    beta_slow: float = Field(default=1.0, gt=0)
    truncate: bool = True
    attention_factor: float | None = Field(default=None, gt=0)

    def to_spec(self) -> RopeSpec:
        """The same as a spec."""
        return RopeSpec(**self.model_dump())


class MoEConfig(Config):
    """The mixture of experts of a model described by `model.spec`; every layer is MoE unless `layers` says which.

    Attributes:
        num_experts, top_k, ffn_size: n, k and the inner width of one expert.
        gate_norm: gating logit normalization: true with its defaults, false for none, or its own section.
        norm_topk: renormalize the chosen probabilities.
        expert_bias: DeepSeek's loss-free balancing.
        shared_ffn_size: inner width of the shared expert; 0 means none.
        layers: ids of the MoE layers; None means all.
    """

    num_experts: int = Field(ge=1)
    top_k: int = Field(default=2, ge=1)
    ffn_size: int = Field(ge=1)
    gate_norm: bool | GateNormConfig = True
    norm_topk: bool = True
    expert_bias: bool = False
    shared_ffn_size: int = Field(default=0, ge=0)
    layers: tuple[int, ...] | None = None


class SpecConfig(Config):
    """A model to be trained from random weights; the fields of ModelSpec, with what follows from others optional.

    Attributes:
        architecture: names on disk; None takes `llama` for a dense model and `skymoe` for a mixture of experts.
        ffn_size: of the dense layers; None only where every layer is MoE.
        num_kv_heads: None means as many as `num_heads`.
        head_dim: None means `hidden_size / num_heads`.
        rope: rotary embedding and its scaling.
        moe: the mixture of experts, or None.
    """

    architecture: Architecture | None = None
    vocab_size: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    num_layers: int = Field(ge=1)
    ffn_size: int | None = Field(default=None, ge=1)
    num_heads: int = Field(ge=1)
    num_kv_heads: int | None = Field(default=None, ge=1)
    head_dim: int | None = Field(default=None, ge=2)
    max_position: int = Field(default=8192, ge=1)
    norm_eps: float = Field(default=1e-6, gt=0)
    rope: RopeConfig = RopeConfig()
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: QkNorm | None = None
    sliding_window: int | None = Field(default=None, ge=1)
    sliding_layers: tuple[int, ...] | None = None
    init_std: float = Field(default=0.02, gt=0)
    bos_id: int | None = Field(default=None, ge=0)
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = Field(default=None, ge=0)
    moe: MoEConfig | None = None

    def to_spec(self) -> ModelSpec:
        """The ModelSpec. Raises ConfigError where the numbers do not fit together."""
        given = self.model_dump(exclude={"architecture", "ffn_size", "num_kv_heads", "head_dim", "rope", "moe"})
        dense_layers = self.moe is None or (self.moe.layers is not None and len(self.moe.layers) < self.num_layers)
        if self.ffn_size is None and dense_layers:
            raise ConfigError("model.spec.ffn_size is needed by the dense layers", where="model.spec")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ConfigError(
                "model.spec.head_dim is needed: num_heads does not divide hidden_size", where="model.spec"
            )
        return ModelSpec(
            **given,
            architecture=self.architecture or (Architecture.SKYMOE if self.moe else Architecture.LLAMA),
            ffn_size=self.ffn_size or (self.moe.ffn_size if self.moe else 0),
            num_kv_heads=self.num_kv_heads or self.num_heads,
            head_dim=self.head_dim or self.hidden_size // self.num_heads,
            rope=self.rope.to_spec(),
            moe=_moe_spec(self.moe) if self.moe else None,
            moe_layers=self.moe.layers if self.moe else None,
        )


class ModelConfig(Config):
    """What is trained; exactly one of `path`, `preset` and `spec`.

    Attributes:
        path: a Hugging Face directory whose weights are the start (a dense parent, or the result of `skymoe upcycle`).
        preset: a named description (`skywork-moe`), with random weights.
        spec: a description, with random weights.
        gate_norm: turn gating logit normalization on or off against what the model says; None leaves it.
        expert_bias: the same for DeepSeek's loss-free bias.
    """

    path: Path | None = None
    preset: str | None = None
    spec: SpecConfig | None = None
    gate_norm: bool | None = None
    expert_bias: bool | None = None

    @model_validator(mode="after")
    def _exactly_one_start(self) -> Self:
        given = [key for key in ("path", "preset", "spec") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of path, preset and spec; got {', '.join(given) or 'none'}")
        return self


def _gate_norm(asked: bool | GateNormConfig) -> GateNormSpec | None:
    if isinstance(asked, GateNormConfig):
        return asked.to_spec()
    return GateNormSpec() if asked else None


def _moe_spec(moe: MoEConfig) -> MoESpec:
    return MoESpec(
        num_experts=moe.num_experts,
        top_k=moe.top_k,
        ffn_size=moe.ffn_size,
        gate_norm=_gate_norm(moe.gate_norm),
        norm_topk=moe.norm_topk,
        expert_bias=moe.expert_bias,
        shared_ffn_size=moe.shared_ffn_size,
    )
