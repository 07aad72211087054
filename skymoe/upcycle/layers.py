"""Which layers of a dense model become mixtures of experts. No torch."""

from __future__ import annotations

from skymoe.base.errors import ConfigError
from skymoe.upcycle.config import UpcycleConfig


def moe_layers(config: UpcycleConfig, num_layers: int) -> tuple[int, ...] | None:
    """Ascending layer ids; None means all. Raises ConfigError."""
    layers = _asked(config, num_layers)
    if not layers:
        what = f"layer_interval is {config.layer_interval}, the model has {num_layers} layers: none would become MoE"
        raise ConfigError(what, where=config.sources[0], hint=f"at most {num_layers}")
    if layers[-1] >= num_layers or layers[0] < 0:
        wrong = layers[0] if layers[0] < 0 else layers[-1]
        what = f"layers names layer {wrong}, the model has {num_layers}"
        raise ConfigError(what, where=config.sources[0], hint=f"layers count from 0 to {num_layers - 1}")
    return None if len(layers) == num_layers else layers


def _asked(config: UpcycleConfig, num_layers: int) -> tuple[int, ...]:
    if config.layers is not None:
        return config.layers
    if config.layer_interval is not None:
        return tuple(range(config.layer_interval - 1, num_layers, config.layer_interval))
    if config.last_layers is not None:
        if config.last_layers > num_layers:
            what = f"last_layers is {config.last_layers}, the model has {num_layers}"
            raise ConfigError(what, where=config.sources[0])
        return tuple(range(num_layers - config.last_layers, num_layers))
    return tuple(range(num_layers))
