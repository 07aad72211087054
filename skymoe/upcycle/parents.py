"""Whether the sources fit the method and one another. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from skymoe.base.errors import ConfigError
from skymoe.base.files import refuse_source
from skymoe.spec.model import ModelSpec, RopeSpec
from skymoe.upcycle.config import PRESETS, Method, Shared, UpcycleConfig

_GATE_DECIDES = "the gate of a trained mixture decides what it computes"
_OWN = ("bos_id", "eos_ids", "pad_id", "init_std")  # specialists may differ here: the base's are kept


def check_parents(config: UpcycleConfig, specs: Sequence[ModelSpec]) -> None:
    """Raise ConfigError unless `config.method` can start from models of these specs."""
    _check_count(config, len(specs))
    for source, spec in zip(config.sources, specs, strict=True):
        refuse_source(config.out, source)
        if config.method is Method.DUPLICATE:
            _check_mixture(config, spec)
        else:
            _check_dense(source, spec)
        _check_agreement(config, source, spec, specs[0])


def _check_count(config: UpcycleConfig, count: int) -> None:
    if config.method is Method.SPECIALISTS and count < 2:
        why = "method specialists takes the feed-forwards of several models"
        raise ConfigError("one source is given", why=why, hint="skymoe upcycle BASE OTHER ... OUT, or --method copy")
    if config.method is not Method.SPECIALISTS and count > 1:
        what = f"{count} sources are given, method {config.method} starts from one"
        raise ConfigError(what, hint="--method specialists makes experts of several models")


def _check_dense(source: object, spec: ModelSpec) -> None:
    if spec.moe is not None:
        raise ConfigError(
            f"this model is already a mixture of experts ({spec.architecture})",
            where=source,
            why="this method starts from a dense model",
            hint="--method duplicate makes it larger; or give its dense parent",
        )
    if spec.mlp_bias:
        why = "experts have no biases in any format that other tools read"
        raise ConfigError("the feed-forward layers have biases (mlp_bias)", where=source, why=why)


def _check_mixture(config: UpcycleConfig, spec: ModelSpec) -> None:
    if spec.moe is None:
        what = f"this model is dense ({spec.architecture})"
        why = "method duplicate copies the experts of a mixture"
        raise ConfigError(what, where=config.sources[0], why=why, hint="--method copy makes a mixture of a dense model")
    has_norm = spec.moe.gate_norm is not None
    wanted = PRESETS[config.preset].gate_norm if config.gate_norm is None else config.gate_norm
    if wanted is not None and wanted != has_norm:
        by, hint = "gate_norm", "leave the option out"
        if config.gate_norm is None:
            by, hint = f"preset {config.preset}", "leave the preset out: --experts and --top-k say the rest of it"
        words = {True: "a normalized gate", False: "a gate without normalization"}
        what, why = f"{by} asks for {words[wanted]}, the model has {words[has_norm]}", _GATE_DECIDES
        raise ConfigError(what, where=config.sources[0], why=why, hint=hint)
    assert config.shared is Shared.NONE  # the config has refused it


def _check_agreement(config: UpcycleConfig, source: object, spec: ModelSpec, base: ModelSpec) -> None:
    for (name, ours), (_, theirs) in zip(_values(spec), _values(base), strict=True):
        if ours != theirs and name not in _OWN:
            what = f"{name} is {ours}, but {theirs} in {config.sources[0]}"
            raise ConfigError(what, where=source, why="specialists are branches of one model")


def _values(spec: ModelSpec) -> Iterator[tuple[str, object]]:
    """Name and value of every field, those of the rotary embedding one by one."""
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if isinstance(value, RopeSpec):
            yield from ((f"rope.{part.name}", getattr(value, part.name)) for part in dataclasses.fields(value))
        else:
            yield field.name, value
