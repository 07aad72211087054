"""Hostile `model.safetensors`: the container, its header, what is no such file at all."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.hostile_tools import (
    VICTIM,
    WEIGHTS,
    Build,
    Case,
    container,
    edit_entry,
    edit_header,
    fifo,
    folder,
    link,
    sparse,
    split,
    write,
)

NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"


def container_with_length(length: int) -> Build:
    def make(directory: Path) -> None:
        header, data = split(directory / WEIGHTS)
        (directory / WEIGHTS).write_bytes(container(header, data, length=length))

    return make


def spliced(before: bytes, after: bytes) -> Build:
    """Replace raw bytes of the header, where JSON itself would not write them."""
    return edit_header(lambda header: json.dumps(header).encode().replace(before, after, 1))


def renamed(name: str) -> Build:
    def change(header: dict[str, Any]) -> None:
        header[name] = header.pop(NORM)

    return edit_header(change)


def entry(**fields: object) -> Build:
    return edit_entry(lambda info: info.update(fields))


def shifted(change: Callable[[int, int], list[int]]) -> Build:
    return edit_entry(lambda info: info.update(data_offsets=change(*info["data_offsets"])))


def resized(change: Callable[[bytes], bytes]) -> Build:
    return lambda directory: (directory / WEIGHTS).write_bytes(change((directory / WEIGHTS).read_bytes())) and None


def extra(name: str, dtype: str, shape: list[int]) -> Build:
    """One more tensor, well formed."""

    def make(directory: Path) -> None:
        header, data = split(directory / WEIGHTS)
        size = {"F32": 4, "I64": 8, "BOOL": 1, "F8_E5M2": 1}[dtype]
        for dim in shape:
            size *= dim
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + size]}
        (directory / WEIGHTS).write_bytes(container(header, data + bytes(size)))

    return make


def same_range_twice(header: dict[str, Any]) -> None:
    header["model.layers.0.input_layernorm.weight"]["data_offsets"] = header[NORM]["data_offsets"]


def swapped_shape(header: dict[str, Any]) -> None:
    header[EMBEDDING]["shape"].reverse()


def unreadable(directory: Path) -> None:
    """A name in the directory that would clear the screen; and no weights."""
    os.rename(directory / WEIGHTS, directory / "\x1b[2J\x1b]0;owned\x07.safetensors")


def case(make: Build, *says: str) -> Case:
    return Case(make, says=(WEIGHTS, *says))


def differing(make: Build, *says: str) -> Case:
    """A sound file that does not hold the tensors of its config."""
    return Case(make, refused="model", says=says)


HEADERS = {
    "length 0": case(container_with_length(0)),
    "length 1": case(container_with_length(1)),
    "length past the end": case(container_with_length(10**6), "cut off"),
    "length 2^63": case(container_with_length(2**63), "cut off"),
    "length 2^64 - 1": case(container_with_length(2**64 - 1), "cut off"),
    "length over the limit": case(sparse(WEIGHTS, 120_000_000, (110_000_000).to_bytes(8, "little")), "limit"),
    "100 MB of zeros as a header": case(sparse(WEIGHTS, 100_000_008, (100_000_000).to_bytes(8, "little"))),
    "nothing": case(write(WEIGHTS, b""), "cut off"),
    "three bytes": case(write(WEIGHTS, b"abc"), "cut off"),
    "header no JSON": case(write(WEIGHTS, container(b"{'w': 1}")), "JSON"),
    "header a list": case(write(WEIGHTS, container(b"[]"))),
    "header with a space in front": case(write(WEIGHTS, container(b" {}"))),
    "header not UTF-8": case(spliced(b'"model.norm', b'"\xff\xfe.norm'), "UTF-8"),
    "header UTF-16": case(edit_header(lambda header: json.dumps(header).encode("utf-16"))),
    "header with NaN": case(spliced(b'"shape": [', b'"shape": [NaN, '), "NaN"),
    "header with infinity": case(spliced(b'"shape": [', b'"shape": [-Infinity, '), "Infinity"),
    "header with 1e999": case(spliced(b'"shape": [', b'"shape": [1e999, '), "too large"),
    "header with 5000 digits": case(spliced(b'"shape": [', b'"shape": [' + b"9" * 5000 + b", ")),
    "header 100,000 objects deep": case(
        write(WEIGHTS, container(b'{"w":' * 100_000 + b"1" + b"}" * 100_000)), "nested"
    ),
    "header 200,000 lists deep": case(
        write(WEIGHTS, container(b'{"w":' + b"[" * 200_000 + b"]" * 200_000 + b"}")), "nested"
    ),
    "header 900 lists deep": case(spliced(b'"shape": [', b'"shape": [' + b"[" * 900 + b"]" * 900 + b","), "nested"),
    "header truncated": case(resized(lambda raw: raw[:100]), "cut off"),
    "no tensor at all": differing(write(WEIGHTS, container({})), "the files hold 0"),
    "tensor twice": case(spliced(b'"model.norm.weight"', b'"lm_head.weight": 1, "model.norm.weight"'), "twice"),
    "field twice": case(spliced(b'"dtype"', b'"dtype": "F16", "dtype"'), "twice"),
    "metadata a list": case(edit_header(lambda header: header | {"__metadata__": ["pt"]}), "__metadata__"),
    "metadata of numbers": case(edit_header(lambda header: header | {"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata nested": case(edit_header(lambda header: header | {"__metadata__": {"a": {}}}), "__metadata__"),
    "metadata null": case(edit_header(lambda header: header | {"__metadata__": None}), "__metadata__"),
    "name climbs": case(renamed("../../../etc/cron.d/job"), "names are"),
    "name absolute": case(renamed("/etc/passwd"), "names are"),
    "name with NUL": case(renamed("model.norm\0.weight"), "names are"),
    "name clears the screen": case(renamed("\x1b[2J\x1b]0;owned\x07"), "names are"),
    "name with a line break": case(renamed("model.norm\nerror: all is well"), "names are"),
    "name turns the text around": case(renamed("model.\u202egnp.exe"), "names are"),
    "name of 100 kB": case(renamed("w" * 100_000), "names are"),
    "name empty": case(renamed(""), "names are"),
    "name a lone surrogate": case(spliced(b'"model.norm.weight"', b'"\\ud800"'), "names are"),
    "name nearly right": differing(renamed("model.norm.Weight"), "missing", "model.norm.weight"),
    "entry a list": case(edit_header(lambda header: header | {NORM: [1, 2]}), NORM),
    "entry null": case(edit_header(lambda header: header | {NORM: None}), NORM),
    "entry with strides": case(entry(strides=[1]), NORM),
    "entry without shape": case(edit_entry(lambda info: info.pop("shape")), NORM),
    "dtype unknown": case(entry(dtype="F31"), NORM, "F31"),
    "dtype of sub-bytes": case(entry(dtype="F4"), NORM),
    "dtype in small letters": case(entry(dtype="f32"), NORM),
    "dtype a list": case(entry(dtype=["F32"]), NORM),
    "dtype code": case(entry(dtype="__import__('os').system('touch canary')"), NORM),
    "dtype an integer of the same size": differing(entry(dtype="I32"), NORM, "int32"),
    "dtype of half the size": case(entry(dtype="F16"), NORM),
    "shape (2^62, 0)": case(entry(shape=[2**62, 0]), NORM, "shape"),
    "shape overflows to the right size": case(entry(shape=[2**32, 2**32]), NORM, "shape"),
    "shape of huge numbers": case(entry(shape=[10**400]), NORM, "shape"),
    "shape negative": case(entry(shape=[-30]), NORM, "shape"),
    "shape a float": case(entry(shape=[30.0]), NORM, "shape"),
    "shape true": case(entry(shape=[True, 30]), NORM, "shape"),
    "shape a number": case(entry(shape=30), NORM, "shape"),
    "shape of 100,000 dimensions": case(entry(shape=[1] * 100_000 + [30]), NORM, "shape"),
    "shape empty": case(entry(shape=[]), NORM),
    "shape swapped": differing(edit_header(swapped_shape), EMBEDDING, "[30, 61]"),
    "shape with one dimension more": differing(entry(shape=[30, 1]), NORM, "[30, 1]"),
    "offsets negative": case(shifted(lambda a, b: [a - 2**40, b - 2**40]), NORM),
    "offsets reversed": case(shifted(lambda a, b: [b, a]), NORM),
    "offsets three": case(shifted(lambda a, b: [a, b, b]), NORM),
    "offsets text": case(shifted(lambda a, b: [str(a), str(b)]), NORM),  # type: ignore[list-item]
    "offsets past the end": case(shifted(lambda a, b: [a + 10**9, b + 10**9]), "hole"),
    "offsets of 2^63": case(shifted(lambda a, b: [2**63, 2**63 + b - a]), NORM),
    "ranges overlap": case(shifted(lambda a, b: [a - 8, b - 8]), "overlaps"),
    "ranges with a hole": case(shifted(lambda a, b: [a + 8, b + 8]), "hole"),
    "one range for two tensors": case(edit_header(same_range_twice), "expected"),
    "data cut off": case(resized(lambda raw: raw[:-1]), "cut off"),
    "data with one byte more": case(resized(lambda raw: raw + b"\0"), "no tensor"),
    "data of two files": case(resized(lambda raw: raw + raw), "no tensor"),
    "a tensor left over": differing(extra("model.layers.0.evil", "F32", [3]), "model.layers.0.evil"),
    "an index buffer left over": differing(extra("model.position_ids", "I64", [1, 64]), "model.position_ids"),
    "an empty tensor left over": differing(extra("model.empty", "F32", [0, 7]), "model.empty"),
    "E5M2 left over": differing(extra("model.layers.0.mlp.up_proj.weight2", "F8_E5M2", [4]), "weight2"),
    "a pickle": case(write(WEIGHTS, b"\x80\x04\x95" + bytes(200))),
    "a zip of torch.save": case(write(WEIGHTS, b"PK\x03\x04" + bytes(200))),
    "a gzip bomb": case(write(WEIGHTS, gzip.compress(bytes(10**7)))),
    "a GGUF file": case(write(WEIGHTS, b"GGUF\x03\0\0\0" + bytes(300))),
    "a pointer of Git LFS": case(write(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")),
    "an error page": case(write(WEIGHTS, b"<!DOCTYPE html><html><body>Access denied</body></html>")),
    "a FIFO": case(fifo(WEIGHTS), "regular"),
    "a directory": case(folder(WEIGHTS), "regular"),
    "a link to /dev/zero": case(link(WEIGHTS, "/dev/zero"), "leads out"),
    "a link to another model": case(link(WEIGHTS, f"../{VICTIM}/{WEIGHTS}"), "leads out"),
    "a link to itself": case(link(WEIGHTS, WEIGHTS), "missing"),
    "a link to nowhere": case(link(WEIGHTS, "not-there"), "missing"),
    "only a file whose name clears the screen": Case(unreadable, says=("no weights",)),
}
