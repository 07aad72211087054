"""The one-device module -> a Hugging Face directory, whole or not at all.

Written into a hidden sibling and renamed at the end, so that a crash or a full disk leaves nothing that looks like a
model. On-hub tensor names, both forms of the rotary fields, the tokenizer's files byte for byte. `skymoe.json` says
where the model comes from; no other tool reads it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skymoe import __version__
from skymoe.base.dtype import DType
from skymoe.base.files import staging_directory, write_atomic
from skymoe.base.log import logger
from skymoe.model.load import float_dtype
from skymoe.model.transformer import Transformer
from skymoe.spec.hf import CONFIG_NAME, config_from_spec, generation_config
from skymoe.spec.hf_families import carried
from skymoe.spec.model import Architecture, ModelSpec
from skymoe.weights.buffers import torch_dtype
from skymoe.weights.companions import (
    GENERATION_NAME,
    PROVENANCE_NAME,
    copy_tokenizer,
    read_companion,
    write_companions,
)
from skymoe.weights.names import Place, tensor_table
from skymoe.weights.writer import DEFAULT_SHARD_BYTES, ShardedWriter

MODELLING_NAMES = ("configuration_skymoe.py", "modeling_skymoe.py")


def save_pretrained(
    model: Transformer,
    out: Path | str,
    *,
    dtype: torch.dtype | str | None = None,
    tokenizer_from: Path | None = None,
    provenance: Mapping[str, Any] | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
) -> Path:
    """Write `model` as a Hugging Face directory.

    A model that its own architecture cannot carry (a Mixtral trained with gate normalization, say) is written as
    `skymoe`, and a log line says so.

    Args:
        model: on any one device.
        out: the directory to create.
        dtype: of the files; None keeps the model's.
        tokenizer_from: a directory whose tokenizer files, chat templates and generation config are copied.
        provenance: more entries for skymoe.json.
        extra_files: file name to content.
        max_shard_bytes: most bytes in one weight file.
        overwrite: replace an existing directory.

    Returns:
        `out` as a Path.

    Raises:
        ConfigError: `out` exists. MachineError: no space, no permission.
    """
    parameters = model.state_dict()
    kept = float_dtype(dtype) if dtype is not None else model.embed.weight.dtype
    return write_pretrained(
        model.spec,
        lambda place: parameters[place.parameter][place.index].detach(),
        Path(out),
        dtype=DType(str(kept).removeprefix("torch.")),
        tokenizer_from=tokenizer_from,
        provenance=provenance,
        extra_files=extra_files,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
    )


def write_pretrained(
    spec: ModelSpec,
    read: Callable[[Place], Tensor],
    out: Path,
    *,
    dtype: DType,
    tokenizer_from: Path | None = None,
    provenance: Mapping[str, Any] | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
) -> Path:
    """As `save_pretrained`, of weights that are asked for one by one: no more than one is held.

    Args:
        spec: of the model.
        read: the tensor of a place, in any float dtype; called once for each, in file order.
        out: the directory to create.
        dtype: of the files.
        tokenizer_from, provenance, extra_files, max_shard_bytes, overwrite: as there.
    """
    spec, reasons = carried(spec)
    if reasons:
        logger.info("saving as skymoe: %s", "; ".join(reasons))
    table = tensor_table(spec)
    with staging_directory(out, overwrite=overwrite) as staging:
        plan = [(name, _stored_dtype(name, dtype), place.shape) for name, place in table.items()]
        with ShardedWriter(staging, plan, max_shard_bytes=max_shard_bytes) as writer:
            for (name, place), (_, planned, _) in zip(table.items(), plan, strict=True):
                writer.add(name, read(place).to(torch_dtype(planned)))
        write_config_files(staging, spec, dtype, source=tokenizer_from)
        write_json(staging / PROVENANCE_NAME, {"skymoe": __version__, **(provenance or {})})
        for name, content in (extra_files or {}).items():
            write_atomic(staging / name, content)
    return out


def write_config_files(
    directory: Path,
    spec: ModelSpec,
    dtype: DType,
    *,
    source: Path | None = None,
    extra_config: Mapping[str, Any] | None = None,
) -> None:
    """What makes weights loadable: config.json, generation_config.json, tokenizer files, modelling files.

    Args:
        directory: exists.
        spec: what the model is; a `skymoe` one gets the two Python files with which transformers can load it.
        dtype: of most of the weights.
        source: a model directory whose tokenizer, chat templates and generation config are copied byte for byte.
        extra_config: more entries of config.json.

    Raises:
        ConfigError: the architecture cannot carry `spec`. FormatError: a file of `source` is hostile.
        MachineError: no space, no permission.
    """
    config = config_from_spec(spec, dtype=dtype.value)
    if spec.architecture is Architecture.SKYMOE:
        package = files("skymoe") / "hf_model"
        write_companions(directory, {name: (package / name).read_bytes() for name in MODELLING_NAMES})
    write_json(directory / CONFIG_NAME, {**config, **(extra_config or {})})
    if source is not None:
        copy_tokenizer(source, directory)
    if source is not None and os.path.lexists(source / GENERATION_NAME):
        write_companions(directory, {GENERATION_NAME: read_companion(source, GENERATION_NAME)})
    else:
        write_json(directory / GENERATION_NAME, generation_config(spec))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as readable JSON."""
    write_atomic(path, (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def _stored_dtype(name: str, dtype: DType) -> DType:
    return DType.FLOAT32 if name.endswith("e_score_correction_bias") else dtype  # added to scores, never multiplied
