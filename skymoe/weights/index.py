"""Which files hold a model's weights: one `model.safetensors`, or shards with an index. No torch.

`model.safetensors.index.json` says which shard holds which tensor. It comes from strangers, so a shard name is a plain
file name inside the directory (with transformers 5.23 an index that names `../other/model.safetensors` still loads the
outside file), a link may not lead out of the directory, and index and shards must agree on every tensor both ways. The
one link followed is that of the Hugging Face cache, where `snapshots/<revision>/` points to the `blobs/` beside it.

Left out: pickle formats (`.bin`, `.pt`, `.pth`, `.ckpt`). Reading one runs the code inside; convert it once instead.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from skymoe.base.errors import FormatError, printable
from skymoe.base.inside import inside
from skymoe.base.strict_json import read_json_object
from skymoe.weights.header import MAX_HEADER_BYTES, TensorFile, TensorInfo, is_safe_name

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,200}\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class ModelFiles:
    """The weight files of a model directory, opened and checked. A context manager.

    Attributes:
        directory: where they are.
        tensors: name to dtype and shape over all files.
        shards: name to the open file that holds the tensor.

    Raises:
        FormatError: no directory, no weights, only pickles, or anything broken or hostile in index and headers.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        weight_map = _find(directory)
        with ExitStack() as stack:
            files = {name: stack.enter_context(TensorFile(path)) for name, path in weight_map.paths.items()}
            if weight_map.shard_of is not None:
                _check_agreement(weight_map.shard_of, files, directory)
            self.shards: Mapping[str, TensorFile] = {
                name: file for file in files.values() for name in file.header.tensors
            }
            self.tensors: Mapping[str, TensorInfo] = {
                name: info for file in files.values() for name, info in file.header.tensors.items()
            }
            self.files: tuple[TensorFile, ...] = tuple(files.values())
            self._stack = stack.pop_all()

    def file(self, name: str) -> TensorFile:
        """The open file that holds tensor `name`. Raises FormatError when there is no such tensor."""
        if name not in self.shards:
            raise FormatError(f"there is no tensor {printable(name)}", where=self.directory)
        return self.shards[name]

    def close(self) -> None:
        """Close every file; harmless twice."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def weight_paths(directory: Path) -> dict[str, Path]:
    """Names of the weight files of a model directory, and where they are, links followed. Raises FormatError."""
    return dict(_find(directory).paths)


class _WeightMap:
    """File names to paths, and with an index, tensor names to file names."""

    def __init__(self, paths: Mapping[str, Path], shard_of: Mapping[str, str] | None) -> None:
        self.paths, self.shard_of = paths, shard_of


def _find(directory: Path) -> _WeightMap:
    if not os.path.lexists(directory):
        raise FormatError("there is no such model directory", where=directory)
    if not os.path.isdir(directory):
        raise FormatError("a model is a directory, this is a file", where=directory, hint="name the folder around it")
    single, index = directory / SINGLE_NAME, directory / INDEX_NAME
    if os.path.lexists(single) and os.path.lexists(index):
        why = f"{SINGLE_NAME} and {INDEX_NAME} are both there, and one of them is left over from another save"
        raise FormatError("two sets of weights", where=directory, why=why, hint="remove the stale one")
    if os.path.lexists(index):
        shard_of = _read_index(index)
        return _WeightMap({name: inside(directory, name) for name in sorted(set(shard_of.values()))}, shard_of)
    if os.path.lexists(single):
        return _WeightMap({SINGLE_NAME: inside(directory, SINGLE_NAME)}, None)
    raise _no_weights(directory)


def _no_weights(directory: Path) -> FormatError:
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        return FormatError(f"the directory cannot be read: {error.strerror}", where=directory)
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        load = "from transformers import AutoModelForCausalLM as M"
        hint = f"convert once where you trust the file: {load}; M.from_pretrained(SRC).save_pretrained(OUT)"
        why = "pickle files can run code when they are read; skymoe reads safetensors only"
        return FormatError(f"only pickled weights ({printable(pickles[0], 80)})", where=directory, why=why, hint=hint)
    others = [name for name in names if name.endswith(".safetensors")]
    found = f"found {printable(', '.join(others[:3]), 200)}" if others else "no .safetensors file at all"
    return FormatError(f"no weights: neither {SINGLE_NAME} nor {INDEX_NAME}", where=directory, why=found)


def _read_index(path: Path) -> dict[str, str]:
    """The weight map: tensor name to shard name, every one of them checked."""
    weight_map = read_json_object(inside(path.parent, path.name), max_bytes=MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError("weight_map must be an object that maps tensors to files", where=path)
    for name, shard in weight_map.items():
        if not is_safe_name(name):
            raise FormatError(f"a tensor is called {printable(repr(name), 80)}", where=path)
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard) or ".." in shard:
            why = "a shard is a plain .safetensors file name in the same directory"
            raise FormatError(f"tensor {name} points to {printable(repr(shard), 80)}", where=path, why=why)
    return weight_map


def _check_agreement(shard_of: Mapping[str, str], files: Mapping[str, TensorFile], directory: Path) -> None:
    """Index and shards name the same tensors in the same files, each once."""
    for shard, file in files.items():
        for name in file.header.tensors:
            if name not in shard_of:
                raise FormatError(f"tensor {name} is in the file but not in the index", where=directory / shard)
            if shard_of[name] != shard:
                why = f"the index puts it in {shard_of[name]}"
                raise FormatError(f"tensor {name} is in the wrong file", where=directory / shard, why=why)
    for name, shard in shard_of.items():
        if name not in files[shard].header.tensors:
            raise FormatError(f"tensor {name} is in the index but not in the file", where=directory / shard)
