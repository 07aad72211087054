"""What was done, in a sentence for the model card, and what the sources say of one another. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from skymoe.base.errors import printable
from skymoe.upcycle.blueprint import Blueprint
from skymoe.upcycle.config import Method, Shared, UpcycleConfig
from skymoe.upcycle.plan import Conversion
from skymoe.weights.companions import read_companion

TOKENIZER_NAME = "tokenizer.json"


def summary(config: UpcycleConfig, conversion: Conversion) -> str:
    """What the new model is made of."""
    blueprint, layers = conversion.blueprint, len(conversion.target.moe_layer_ids)
    where = "every layer" if conversion.target.num_dense_layers == 0 else f"{layers} layers"
    counts = f"{blueprint.moe.num_experts} experts, {blueprint.moe.top_k} of them per token"
    became = f"The feed-forward of {where} became {counts}"
    if blueprint.method is Method.DUPLICATE:
        became = f"The experts of {where} were multiplied to {counts}"
    return f"{became}: {_experts(config, blueprint)}.{_shared(blueprint)}"


def _experts(config: UpcycleConfig, blueprint: Blueprint) -> str:
    match blueprint.method:
        case Method.COPY:
            return "each is a copy of it"
        case Method.DROP:
            return f"copies with {config.ratio:.0%} of the neurons drawn anew"
        case Method.NOISE:
            return f"copies with noise of {config.noise_std:g} deviations on {config.noise_share:.0%} of the neurons"
        case Method.VIRTUAL_GROUP:
            shards, total = blueprint.shards, blueprint.shards + blueprint.shared_shards
            return f"{blueprint.router_rows} virtual groups of {shards} shards, each 1/{total} of its neurons"
        case Method.SPECIALISTS:
            counts = [blueprint.assign.count(source) for source in range(len(config.sources))]
            return (
                f"{' + '.join(map(str, counts))} experts from the sources in their order, the rest is {_rest(config)}"
            )
        case Method.PARTITION:
            return f"each has 1/{blueprint.moe.num_experts} of its neurons, its output times {blueprint.down_scale:g}"
        case Method.DUPLICATE:
            noise = f", router noise {blueprint.router_noise:g} on the copies" if blueprint.router_noise else ""
            return f"expert i is expert i modulo the old number{noise}"


def _rest(config: UpcycleConfig) -> str:
    return "the first source's" if config.rest == "base" else "the mean over the sources"


def _shared(blueprint: Blueprint) -> str:
    match blueprint.shared:
        case Shared.ZERO_ROUTED:
            return " A shared expert is the dense feed-forward; the routed experts begin with a zero down projection."
        case Shared.SPLIT:
            return f" A shared expert has the first {blueprint.shared_shards} shards."
        case Shared.NONE:
            return ""


def other_tokenizers(directories: Sequence[Path]) -> tuple[str, ...]:
    """A remark for each source whose tokenizer.json is not the first one's: its experts know other tokens.

    Raises:
        FormatError: such a file leads out of its directory, or is absurdly large.
    """
    kept = _tokenizer(directories[0]) if len(directories) > 1 else b""
    return tuple(
        f"{printable(directory)} has another {TOKENIZER_NAME} than the first source, whose is kept"
        for directory in directories[1:]
        if kept and _tokenizer(directory) not in (b"", kept)
    )


def _tokenizer(directory: Path) -> bytes:
    return read_companion(directory, TOKENIZER_NAME) if (directory / TOKENIZER_NAME).is_file() else b""
