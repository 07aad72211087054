"""What is asked of a serving plan, in full: model, formats, GPUs, engine, workload, divisions that are given."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from skymoe.base.errors import ConfigError, printable
from skymoe.plan.hardware.catalogue import parse_gpus
from skymoe.plan.hardware.gpu import Gpu, Precision
from skymoe.plan.serve.config import PlanServeConfig
from skymoe.plan.serve.engine import Engine, find_engine
from skymoe.plan.serve.fit import reserves
from skymoe.plan.serve.model import Served
from skymoe.plan.serve.pieces import Wish, countable, nearest
from skymoe.plan.serve.workload import Workload
from skymoe.plan.shape import shape_of
from skymoe.spec.named import read_model

T = TypeVar("T")

_CONTEXT = 4096
_STORED: Mapping[str, tuple[float, Precision]] = {
    "fp32": (4.0, Precision.FP32),
    "bf16": (2.0, Precision.BF16),
    "fp8": (1.0, Precision.FP8),  # a 4-byte scale per 128 x 128 block: 0.02 %, left out
    "int8": (1.0, Precision.INT8),
    "int4": (0.5625, Precision.INT4),  # a 16-bit scale per 32 elements
    "nvfp4": (0.5625, Precision.NVFP4),  # a scale byte per 16 elements
}
_KV = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question in full: `config` resolved."""

    config: PlanServeConfig
    served: Served
    gpus: tuple[Gpu, ...]
    engine: Engine
    context: int
    max_position: int
    workload: Workload
    max_batch: int
    reserve: tuple[float, ...]
    wish: Wish


def read_asked(config: PlanServeConfig) -> Asked:
    """Fill in what was not said.

    Raises:
        ConfigError, FormatError: no such model, GPU or engine; a context or a split that cannot be.
    """
    gpus, engine = _of("--gpus", parse_gpus, config.gpus), _of("--engine", find_engine, config.engine)
    spec = read_model(config.model)
    weight_bytes, compute = _STORED[config.weights]
    served = Served(
        shape=shape_of(spec, Path(config.model).name), weight_bytes=weight_bytes, compute=compute,
        kv_bytes=_KV[config.kv], head_bytes=4.0 if config.weights == "fp32" else 2.0,
    )  # fmt: skip
    context = config.context or min(max(_CONTEXT, config.prompt + config.output), spec.max_position)
    if context > spec.max_position:
        raise ConfigError(
            f"a context of {context} is more than the {spec.max_position} of {printable(config.model)}",
            hint=f"--context {spec.max_position}",
        )
    if min(config.batch) < 1 or max(config.batch) > 1 << 20:
        raise ConfigError(f"--batch must be from 1 to {1 << 20}, got {', '.join(map(str, config.batch[:20]))}")
    max_batch = min(max(config.batch), engine.max_batch)
    return Asked(
        config=config, served=served, gpus=gpus, engine=engine, context=context,
        max_position=spec.max_position,
        workload=Workload(prompt=config.prompt, output=config.output), max_batch=max_batch,
        reserve=reserves(served, gpus, engine, max_batch=max_batch, given=config.reserve),
        wish=Wish(
            kv_tokens=context, load_tokens=context, rotate=config.rotate, whole=config.experts == "whole",
            fixed=_fixed(config, served, len(gpus)),
        ),
    )  # fmt: skip


def _of(flag: str, read: Callable[[str], T], text: str) -> T:
    """What the value of `flag` names; errors name the flag."""
    try:
        return read(text)
    except ConfigError as error:
        raise ConfigError(error.what, where=flag, why=error.why, hint=error.hint) from error


def check_length(asked: Asked) -> None:
    """Raises ConfigError when a request is longer than the longest sequence there may be."""
    length = asked.workload.length
    if length > asked.context:
        raise ConfigError(
            f"a request of {length} tokens, prompt and answer, is longer than the context of {asked.context}",
            where="--prompt", hint=_shorter(asked),
        )  # fmt: skip


def _shorter(asked: Asked) -> str:
    """A longer context where the model has it, and lengths that fit the longest context there may be."""
    prompt, output = asked.workload.prompt, asked.workload.output
    if asked.workload.length <= asked.max_position:
        return f"--context {asked.workload.length}, or shorter: {_lengths(prompt, output, asked.context)}"
    return f"{_lengths(prompt, output, asked.max_position)}; the model has {asked.max_position} positions"


def _lengths(prompt: int, output: int, most: int) -> str:
    """Two lengths in about the same proportion that sum to `most`."""
    output = max(1, most * output // (prompt + output))
    return f"--prompt {max(1, most - output)} --output {output}"


def _fixed(config: PlanServeConfig, served: Served, num_gpus: int) -> dict[str, tuple[float, ...]]:
    """`heads=5,5,4` by name."""
    found: dict[str, tuple[float, ...]] = {}
    for text in config.split:
        name, equals, values = text.partition("=")
        if not equals or name not in ("heads", "ffn", "experts", "vocabulary", "weights") or name in found:
            raise ConfigError(
                f"cannot read --split {printable(text, 80)!r}",
                hint="heads=5,5,4 or ffn=, experts=, vocabulary=, each once; or weights=3,1",
            )
        try:
            sizes = tuple(float(value) for value in values.split(","))
        except ValueError:
            sizes = ()
        if len(sizes) != num_gpus or any(not 0 <= size < 1e12 or math.isnan(size) for size in sizes):
            raise ConfigError(
                f"--split {name} needs {num_gpus} numbers, one per GPU, none negative; got {printable(values, 80)}",
                hint=f"--split {name}={_even(served, name, num_gpus)}",
            )
        found[name] = sizes
    if "experts" in found and config.experts == "cut":
        raise ConfigError("--split experts divides whole experts", hint="add --experts whole, or use --split ffn=")
    if "ffn" in found and config.experts == "whole":
        raise ConfigError("--split ffn divides the columns of every expert", hint="--experts cut, or --split experts=")
    return found


def _even(served: Served, name: str, num_gpus: int) -> str:
    """An even division, as it would be written."""
    return ",".join(map(str, nearest((1.0,) * num_gpus, countable(served, name, num_gpus))))
