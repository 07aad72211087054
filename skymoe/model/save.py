"""The one-device module -> a Hugging Face directory, whole or not at all.

Written into a hidden sibling and renamed at the end, so that a crash or a full disk leaves nothing that looks like a
model. On-hub tensor names, both forms of the rotary fields, the tokenizer's files byte for byte. `skymoe.json` says
where the model comes from; no other tool reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from skymoe import __version__
from skymoe.base.dtype import DType
from skymoe.base.files import staging_directory, write_atomic
from skymoe.base.inside import read_inside
from skymoe.base.log import logger
from skymoe.model.load import float_dtype
from skymoe.model.transformer import Transformer
from skymoe.spec.hf import CONFIG_NAME, config_from_spec, generation_config
from skymoe.spec.hf_families import carried
from skymoe.spec.model import Architecture, ModelSpec
from skymoe.weights.buffers import torch_dtype
from skymoe.weights.names import tensor_table
from skymoe.weights.writer import DEFAULT_SHARD_BYTES, ShardedWriter

PROVENANCE_NAME = "skymoe.json"
GENERATION_NAME = "generation_config.json"
TOKENIZER_NAMES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
MODELLING_NAMES = ("configuration_skymoe.py", "modeling_skymoe.py")
_MAX_COPIED_BYTES = 256 * 2**20  # of one tokenizer file


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
        tokenizer_from: a directory whose tokenizer and generation files are copied.
        provenance: more entries for skymoe.json.
        extra_files: file name to content.
        max_shard_bytes: most bytes in one weight file.
        overwrite: replace an existing directory.

    Returns:
        `out` as a Path.

    Raises:
        ConfigError: `out` exists. MachineError: no space, no permission.
    """
    out = Path(out)
    spec, reasons = carried(model.spec)
    if reasons:
        logger.info("saving as skymoe: %s", "; ".join(reasons))
    parameters = model.state_dict()
    kept = float_dtype(dtype) if dtype is not None else model.embed.weight.dtype
    stored = DType(str(kept).removeprefix("torch."))
    table = tensor_table(spec)
    with staging_directory(out, overwrite=overwrite) as staging:
        plan = [(name, _stored_dtype(name, stored), place.shape) for name, place in table.items()]
        with ShardedWriter(staging, plan, max_shard_bytes=max_shard_bytes) as writer:
            for (name, place), (_, planned, _) in zip(table.items(), plan, strict=True):
                tensor = parameters[place.parameter][place.index].detach()
                writer.add(name, tensor.to(torch_dtype(planned)))
        write_documents(staging, spec, stored, source=tokenizer_from, provenance=provenance)
        for name, content in (extra_files or {}).items():
            write_atomic(staging / name, content)
    return out


def write_documents(
    directory: Path,
    spec: ModelSpec,
    dtype: DType,
    *,
    source: Path | None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Everything of a model directory but the weights: configs, tokenizer files of `source`, provenance.

    A `skymoe` directory also gets the two Python files with which transformers can load it (trust_remote_code).
    """
    config = config_from_spec(spec, dtype=dtype.value)
    if spec.architecture is Architecture.SKYMOE:
        package = files("skymoe") / "hf_model"
        for name in MODELLING_NAMES:
            write_atomic(directory / name, (package / name).read_bytes())
    write_json(directory / CONFIG_NAME, config)
    names = TOKENIZER_NAMES if source is None else (*TOKENIZER_NAMES, GENERATION_NAME)
    copied = [name for name in names if source is not None and _copy(source, directory, name)]
    if GENERATION_NAME not in copied:
        write_json(directory / GENERATION_NAME, generation_config(spec))
    write_json(directory / PROVENANCE_NAME, {"skymoe": __version__, **(provenance or {})})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as readable JSON."""
    write_atomic(path, (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def _stored_dtype(name: str, dtype: DType) -> DType:
    return DType.FLOAT32 if name.endswith("e_score_correction_bias") else dtype  # added to scores, never multiplied


def _copy(source: Path, directory: Path, name: str) -> bool:
    content = read_inside(source, name, max_bytes=_MAX_COPIED_BYTES)
    if content is not None:
        write_atomic(directory / name, content)
    return content is not None
