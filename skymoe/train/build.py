"""The model of a recipe: its spec first, without touching weights, then the module."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from skymoe.base.errors import ConfigError
from skymoe.model.init import initialize
from skymoe.model.load import load
from skymoe.model.transformer import Transformer
from skymoe.spec.hf import spec_from_directory
from skymoe.spec.model import GateNormSpec, ModelSpec
from skymoe.spec.presets import preset
from skymoe.train.config import TrainConfig
from skymoe.train.model_config import ModelConfig
from skymoe.train.objective import moe_modules


def resolve_spec(config: TrainConfig) -> ModelSpec:
    """What is trained, checked against the rest of the recipe.

    Raises:
        ConfigError: naming the key that does not fit.
        FormatError: `model.path` cannot be read.
    """
    spec = _with_overrides(_given_spec(config.model), config.model)
    if config.data.sequence_length > spec.max_position:
        raise ConfigError(
            f"sequences of {config.data.sequence_length} tokens, but the model's context is {spec.max_position}",
            where="data.sequence_length",
        )
    if isinstance(config.recompute, int) and config.recompute > spec.num_layers:
        raise ConfigError(f"{config.recompute} layers of {spec.num_layers}", where="recompute")
    if config.balance.z_loss and spec.moe and spec.moe.gate_norm:
        raise ConfigError(
            "the z-loss has nothing to act on under gate normalization",
            where="balance.z_loss",
            why="the scale of the logits does not reach the output; the loss would only shrink the router weights",
            hint="balance.z_loss=0",
        )
    return spec


def build_model(
    config: ModelConfig, spec: ModelSpec, *, seed: int, dtype: torch.dtype, device: torch.device, load_weights: bool
) -> Transformer:
    """The module. Without `load_weights` its values are arbitrary: a checkpoint follows."""
    if config.path is None or not load_weights:
        model = Transformer(spec)
        if load_weights:
            initialize(model, seed)
    else:
        model = _with_spec(load(config.path), spec)
    model.to(device=device, dtype=dtype)
    for moe in moe_modules(model):
        if moe.router.expert_bias is not None:
            # It moves in steps of 1e-3, which bf16 would swallow.
            moe.router.expert_bias = moe.router.expert_bias.float()
    return model


def _given_spec(config: ModelConfig) -> ModelSpec:
    if config.path is not None:
        return spec_from_directory(config.path)
    if config.spec is not None:
        try:
            return config.spec.to_spec()
        except ConfigError as error:
            raise ConfigError(error.what, where="model.spec", why=error.why, hint=error.hint) from error
    assert config.preset is not None
    return preset(config.preset)


def _with_overrides(spec: ModelSpec, config: ModelConfig) -> ModelSpec:
    changes: dict[str, Any] = {}
    if config.gate_norm is not None:
        kept = spec.moe.gate_norm if spec.moe else None
        changes["gate_norm"] = (kept or GateNormSpec()) if config.gate_norm else None
    if config.expert_bias is not None:
        changes["expert_bias"] = config.expert_bias
    if not changes:
        return spec
    if spec.moe is None:
        raise ConfigError("the model is dense: it has no gate", where=f"model.{next(iter(changes))}")
    return replace(spec, moe=replace(spec.moe, **changes))


def _with_spec(model: Transformer, spec: ModelSpec) -> Transformer:
    """The same weights under a spec that differs in its gate settings only."""
    if model.spec == spec:
        return model
    other = Transformer(spec)
    other.load_state_dict(model.state_dict(), strict=False, assign=True)  # the loss-free bias may come or go
    return other
