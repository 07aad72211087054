"""A checkpoint generation -> a Hugging Face directory, one tensor at a time, whatever layout wrote the generation.

The model is never built: each tensor of a file is read as a box of the whole one, cast, and written at its place, so
that a model larger than memory is exported by a laptop. Which model it is, `state.json` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skymoe.base.dtype import DType
from skymoe.base.errors import CheckpointError
from skymoe.base.files import refuse_source
from skymoe.model.load import float_dtype
from skymoe.model.save import write_pretrained
from skymoe.spec.model import ModelSpec
from skymoe.spec.plain import spec_from_plain
from skymoe.weights.generation import Generation
from skymoe.weights.header import TensorInfo
from skymoe.weights.names import Place, parameter_shapes
from skymoe.weights.sliced import SlicedGeneration
from skymoe.weights.slices import Box


def export_generation(
    generation: Generation,
    out: Path,
    *,
    dtype: torch.dtype | str | None = None,
    tokenizer_from: Path | None = None,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the model of `generation` as `model.save.save_pretrained` would. Returns `out`.

    Args:
        generation: verified (`latest_generation`, `load_generation`).
        out: the directory to create.
        dtype: of the files; None keeps that of the run.
        tokenizer_from: a directory whose tokenizer files, chat templates and generation config are copied.
        provenance: more entries for skymoe.json.
        overwrite: replace an existing directory.

    Raises:
        CheckpointError: the generation is not of a model, or holds other tensors than its model has.
        ConfigError: `out` exists, or `dtype` is none. MachineError: no space, no permission.
    """
    refuse_source(out, generation.path)
    spec = spec_of(generation)
    sliced = SlicedGeneration(generation)
    infos = sliced.names("model")
    _check(infos, spec, generation.path)
    kept = infos["embed.weight"].dtype if dtype is None else DType(str(float_dtype(dtype)).removeprefix("torch."))

    def read(place: Place) -> Tensor:
        box, shape = _box(place, infos[place.parameter].shape)
        tensor = sliced.read("model", place.parameter, box)
        assert tensor is not None
        return tensor.view(shape)

    return write_pretrained(
        spec, read, out, dtype=kept, tokenizer_from=tokenizer_from, provenance=provenance, overwrite=overwrite
    )


def spec_of(generation: Generation) -> ModelSpec:
    """The model whose state a generation is. Raises CheckpointError when it does not say."""
    document = generation.document("state")
    if not isinstance(document, dict) or "model" not in document:
        raise CheckpointError("state.json does not say which model it is of", where=generation.path)
    return spec_from_plain(document["model"], where=generation.path / "state.json")


def _check(infos: Mapping[str, TensorInfo], spec: ModelSpec, where: Path) -> None:
    """Nothing is missing, nothing is left over, every shape is the model's."""
    shapes = parameter_shapes(spec)
    if differing := sorted(infos.keys() ^ shapes.keys()):
        raise CheckpointError("the tensors are not those of its model", where=where, why=", ".join(differing[:5]))
    for name, shape in shapes.items():
        if infos[name].shape != shape:
            raise CheckpointError(f"{name} is {list(infos[name].shape)}, its model has {list(shape)}", where=where)


def _box(place: Place, whole: tuple[int, ...]) -> tuple[Box, tuple[int, ...]]:
    """Which box of the parameter a file's tensor is, and the file's shape: without the dimension of the expert."""
    box = tuple((0, size) for size in whole)
    if place.expert is None:
        return box, whole
    rows = place.rows or box[1]
    return ((place.expert, place.expert + 1), rows, *box[2:]), place.shape
