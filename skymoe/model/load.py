"""A Hugging Face directory -> the one-device module.

The module is built without memory (on torch's `meta` device), the files are held against the spec (`weights.match`),
and then each tensor is read into its final place: peak memory is the model plus one tensor. Nothing is guessed: a
tensor that is missing or left over is an error, code in the directory is never run, pickled weights are never opened.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from skymoe.base.dtype import DType
from skymoe.base.errors import ConfigError, FormatError
from skymoe.model.transformer import Transformer
from skymoe.ops.device import usable_device
from skymoe.ops.experts import ExpertsBackend
from skymoe.spec.hf import spec_from_directory
from skymoe.spec.model import ModelSpec
from skymoe.weights.buffers import torch_dtype
from skymoe.weights.decoded import DecodedReader
from skymoe.weights.match import EMBEDDING_NAME, FLOATS, HEAD_NAME, Match, match_tensors
from skymoe.weights.names import parameter_shapes
from skymoe.weights.reader import WeightsReader


def load(
    path: Path | str,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    *,
    experts: ExpertsBackend = ExpertsBackend.GROUPED,
) -> Transformer:
    """The model in directory `path`; `model(tokens_BT)` gives logits (B, T, V).

    Args:
        path: a Hugging Face model directory: config.json and safetensors.
        dtype: of all parameters; None keeps that of the files (where they mix, that of most bytes; FP8 is decoded to
            bfloat16).
        device: where the parameters live.
        experts: how the experts are multiplied.

    Raises:
        FormatError: no such model, or anything in it that is missing, broken, hostile or not supported.
        ConfigError, MachineError: no such dtype, no such device.
    """
    directory, device = Path(path), usable_device(device)
    spec = spec_from_directory(directory)
    asked = None if dtype is None else float_dtype(dtype)
    decode_to = DType.BFLOAT16 if asked in (None, torch.bfloat16) else DType.FLOAT32
    with DecodedReader(directory, decode_to=decode_to) as reader:
        match = match_tensors(spec, reader.names(), where=directory)
        check_spare_head(reader, match)
        state = read_parameters(reader, spec, match, dtype=asked or torch_dtype(match.dtype), device=device)
    return assemble(spec, state, experts=experts)


def assemble(
    spec: ModelSpec, state: dict[str, Tensor], *, experts: ExpertsBackend = ExpertsBackend.GROUPED
) -> Transformer:
    """A Transformer whose parameters are the tensors of `state` (module names), without a copy."""
    with torch.device("meta"):
        model = Transformer(spec, experts=experts)
    model.load_state_dict(state, strict=True, assign=True)
    return model


def read_parameters(
    reader: WeightsReader,
    spec: ModelSpec,
    match: Match,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    prefix: str = "",
) -> dict[str, Tensor]:
    """The parameters whose module name begins with `prefix`, read one file tensor at a time.

    Returns:
        Module name (without `prefix`) to tensor in `dtype` on `device`; expert biases stay fp32.
    """
    shapes = parameter_shapes(spec)
    state: dict[str, Tensor] = {}
    for name, place in match.table.items():
        if not place.parameter.startswith(prefix):
            continue
        key = place.parameter.removeprefix(prefix)
        kept = torch.float32 if key.endswith("expert_bias") else dtype
        if place.expert is None:
            state[key] = reader.tensor(name).to(device, kept)
            continue
        if key not in state:
            state[key] = torch.empty(shapes[place.parameter], dtype=kept, device=device)
        state[key][place.index].copy_(reader.tensor(name))
    return state


def check_spare_head(reader: WeightsReader, match: Match) -> None:
    """A tied model whose file has a head all the same: they must be equal.

    Raises:
        FormatError: they differ.
    """
    if match.spare_head and not torch.equal(reader.tensor(HEAD_NAME), reader.tensor(EMBEDDING_NAME)):
        raise FormatError(
            f"{HEAD_NAME} differs from {EMBEDDING_NAME}",
            where=reader.directory,
            why="config.json says tie_word_embeddings: true, so one of the two would be lost",
            hint="set tie_word_embeddings to false if the head is meant",
        )


def float_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The torch dtype of a name such as "bfloat16". Raises ConfigError for one that is no plain float."""
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype not in list(FLOATS):
        raise ConfigError(f"dtype must be one of {', '.join(FLOATS)}, got {dtype!r}")
    return torch_dtype(DType(dtype))
