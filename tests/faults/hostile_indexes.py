"""Hostile `model.safetensors.index.json` and shards."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.hostile_tools import (
    CONFIG,
    INDEX,
    VICTIM,
    WEIGHTS,
    Case,
    edit_json,
    fifo,
    folder,
    link,
    sparse,
    write,
)
from safetensors.torch import load_file, save_file

NORM = "model.norm.weight"


def index(change: Callable[[dict[str, Any]], object], *says: str) -> Case:
    return Case(edit_json(INDEX, change), "sharded", says=(INDEX, *says))


def to_shard(name: str) -> Case:
    """The index sends one tensor to this file."""
    return index(lambda document: document["weight_map"].update({NORM: name}), NORM, "points to")


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("model-*.safetensors"))


def shard_gone(directory: Path) -> None:
    shards(directory)[1].unlink()


def shard_link_out(directory: Path) -> None:
    shard = shards(directory)[0]
    outside = directory.parent / VICTIM / "shard.safetensors"
    shutil.move(shard, outside)
    shard.symlink_to(f"../{VICTIM}/shard.safetensors")


def shard_links_in_a_circle(directory: Path) -> None:
    first, second = shards(directory)[:2]
    first.unlink()
    second.unlink()
    first.symlink_to(second.name)
    second.symlink_to(first.name)


def shard_of_devices(directory: Path) -> None:
    shards(directory)[0].unlink()
    os.mkfifo(directory / shards(directory)[0].name.replace("00002", "00001"))


def single_file_too(directory: Path) -> None:
    shutil.copy(directory.parent / VICTIM / WEIGHTS, directory / WEIGHTS)


def shards_swapped(directory: Path) -> None:
    first, second = shards(directory)[:2]
    first.rename(directory / "x")
    second.rename(first)
    (directory / "x").rename(second)


def tensor_in_two_shards(directory: Path) -> None:
    first, second = shards(directory)[:2]
    tensors = load_file(second)
    save_file(load_file(first) | {next(iter(tensors)): next(iter(tensors.values()))}, first)


def index_key_twice(directory: Path) -> None:
    text = (directory / INDEX).read_text()
    (directory / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{"{NORM}": "x.safetensors", ', 1))


INDEXES = {
    "shard climbs": to_shard(f"../{VICTIM}/{WEIGHTS}"),
    "shard climbs in the middle": to_shard(f"a/../../{VICTIM}/{WEIGHTS}"),
    "shard absolute": to_shard("/etc/passwd"),
    "shard absolute .safetensors": to_shard("/tmp/x.safetensors"),
    "shard with NUL": to_shard("model\0.safetensors"),
    "shard clears the screen": to_shard("\x1b[2J.safetensors"),
    "shard a URL": to_shard("https://example.invalid/model.safetensors"),
    "shard a drive": to_shard("C:\\Windows\\x.safetensors"),
    "shard a network share": to_shard("\\\\host\\share\\x.safetensors"),
    "shard a pickle": to_shard("pytorch_model.bin"),
    "shard the index itself": to_shard(INDEX),
    "shard in a folder": to_shard("sub/model.safetensors"),
    "shard of 100 kB": to_shard("x" * 100_000 + ".safetensors"),
    "shard hidden": to_shard(".model.safetensors"),
    "shard empty": to_shard(""),
    "shard a number": index(lambda document: document["weight_map"].update({NORM: 1}), NORM),
    "shard null": index(lambda document: document["weight_map"].update({NORM: None}), NORM),
    "shard a list": index(lambda document: document["weight_map"].update({NORM: ["a.safetensors"]}), NORM),
    "shard missing": Case(shard_gone, "sharded", says=("missing",)),
    "shard a link out": Case(shard_link_out, "sharded", says=("leads out",)),
    "shards link in a circle": Case(shard_links_in_a_circle, "sharded", says=("missing",)),
    "shard a FIFO": Case(shard_of_devices, "sharded", says=("regular",)),
    "shards swapped": Case(shards_swapped, "sharded", says=("wrong file",)),
    "tensor in two shards": Case(tensor_in_two_shards, "sharded", says=("wrong file",)),
    "index and single file": Case(single_file_too, "sharded", says=("two sets of weights",)),
    "weight_map a list": index(lambda document: document.update(weight_map=[]), "weight_map"),
    "weight_map null": index(lambda document: document.update(weight_map=None), "weight_map"),
    "weight_map empty": index(lambda document: document.update(weight_map={}), "weight_map"),
    "weight_map missing": index(lambda document: (document.pop("weight_map"), None)[1], "weight_map"),
    "index a list": index(lambda document: [document], "object"),
    "index lacks a tensor": Case(
        edit_json(INDEX, lambda document: (document["weight_map"].pop(NORM), None)[1]),
        "sharded", says=(NORM, "not in the index"),
    ),
    "index has a tensor too many": Case(
        edit_json(INDEX, lambda document: document["weight_map"].update(evil=document["weight_map"][NORM])),
        "sharded", says=("evil", "not in the file"),
    ),
    "index has a name that climbs": index(
        lambda document: document["weight_map"].update({"../../x": document["weight_map"][NORM]}), "../../x"
    ),
    "index names a tensor twice": Case(index_key_twice, "sharded", says=(INDEX, "twice")),
    "index of 200 MB": Case(sparse(INDEX, 200_000_000, b"{"), "sharded", says=(INDEX, "larger")),
    "index with NaN": index(lambda document: document.update(metadata={"total_size": float("nan")}), "NaN"),
    "index 100,000 deep": Case(
        write(INDEX, b'{"weight_map":' * 100_000 + b"1" + b"}" * 100_000), "sharded", says=(INDEX, "nested")
    ),
    "index a FIFO": Case(fifo(INDEX), "sharded", says=(INDEX, "regular")),
    "index a directory": Case(folder(INDEX), "sharded", says=(INDEX, "regular")),
    "index a link out": Case(link(INDEX, f"../{VICTIM}/{CONFIG}"), "sharded", says=(INDEX, "leads out")),
    "index empty": Case(write(INDEX, b""), "sharded", says=(INDEX, "JSON")),
}  # fmt: skip
