"""Model directories from strangers: what is read, and what is refused without a byte being written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skymoe.base.dtype import DType
from skymoe.base.errors import FormatError
from skymoe.weights.header import TensorInfo, plan_file
from skymoe.weights.index import INDEX_NAME, SINGLE_NAME, ModelFiles

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write_file(path: Path, *names: str) -> None:
    prefix, header = plan_file({name: TensorInfo(DType.FLOAT32, (2, 3)) for name in names}, {"format": "pt"})
    path.write_bytes(prefix + bytes(header.num_bytes - len(prefix)))


def write_index(directory: Path, weight_map: object, **more: object) -> None:
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": 72}, "weight_map": weight_map, **more}))


def honest(directory: Path) -> None:
    write_file(directory / A, "a", "b")
    write_file(directory / B, "c")
    write_index(directory, {"a": A, "b": A, "c": B})


def pointing_to(shard: object) -> Callable[[Path], None]:
    def build(directory: Path) -> None:
        honest(directory)
        outside = directory.parent / "victim"
        outside.mkdir(exist_ok=True)
        write_file(outside / SINGLE_NAME, "c")
        write_index(directory, {"a": A, "b": A, "c": shard})

    return build


def link_out(directory: Path) -> None:
    honest(directory)
    outside = directory.parent / "victim"
    outside.mkdir()
    write_file(outside / B, "c")
    (directory / B).unlink()
    (directory / B).symlink_to(outside / B)


def link_index_out(directory: Path) -> None:
    honest(directory)
    (directory / INDEX_NAME).rename(directory.parent / "index.json")
    (directory / INDEX_NAME).symlink_to(directory.parent / "index.json")


def link_circle(directory: Path) -> None:
    honest(directory)
    (directory / B).unlink()
    (directory / B).symlink_to(directory / B)


def raw_index(text: bytes) -> Callable[[Path], None]:
    def build(directory: Path) -> None:
        honest(directory)
        (directory / INDEX_NAME).write_bytes(text)

    return build


def with_map(weight_map: object) -> Callable[[Path], None]:
    def build(directory: Path) -> None:
        honest(directory)
        write_index(directory, weight_map)

    return build


def only(*names: str) -> Callable[[Path], None]:
    def build(directory: Path) -> None:
        for name in names:
            (directory / name).write_bytes(b"\x80\x04.")

    return build


def then(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def build(directory: Path) -> None:
        honest(directory)
        change(directory)

    return build


def two_sets(directory: Path) -> None:
    honest(directory)
    write_file(directory / SINGLE_NAME, "a", "b", "c")


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty directory": (lambda directory: None, "no weights"),
    "only .bin": (only("pytorch_model.bin", "config.json"), "save_pretrained"),
    "only .pt": (only("model.pt"), "pickled"),
    "only .pth": (only("consolidated.00.pth"), "pickled"),
    "only .ckpt": (only("model.ckpt"), "pickled"),
    "an unknown safetensors name": (only("adapter_model.safetensors"), "adapter_model"),
    "two sets of weights": (two_sets, "stale"),
    "climbing": (pointing_to("../victim/model.safetensors"), "plain"),
    "climbing later": (pointing_to("a/../../victim/model.safetensors"), "plain"),
    "absolute": (pointing_to("/tmp/model.safetensors"), "plain"),
    "below": (pointing_to("sub/model.safetensors"), "plain"),
    "backslashes": (pointing_to("..\\victim\\model.safetensors"), "plain"),
    "drive letter": (pointing_to("C:model.safetensors"), "plain"),
    "url": (pointing_to("https://example.org/model.safetensors"), "plain"),
    "nul": (pointing_to("model\0.safetensors"), "plain"),
    "terminal escape": (pointing_to("\x1b[2Jmodel.safetensors"), "plain"),
    "hidden": (pointing_to(".model.safetensors"), "plain"),
    "dots only": (pointing_to("..safetensors"), "plain"),
    "long": (pointing_to("m" * 5000 + ".safetensors"), "plain"),
    "a pickle as shard": (pointing_to("pytorch_model.bin"), "plain"),
    "a number as shard": (pointing_to(3), "plain"),
    "a list as shard": (pointing_to([B]), "plain"),
    "null as shard": (pointing_to(None), "plain"),
    "trailing newline": (pointing_to(B + "\n"), "plain"),
    "missing shard": (pointing_to("model-00003-of-00003.safetensors"), "missing"),
    "shard is a directory": (then(lambda d: ((d / B).unlink(), (d / B).mkdir())), "regular file"),
    "shard is a fifo": (then(lambda d: ((d / B).unlink(), os.mkfifo(d / B))), "regular file"),
    "shard cut off": (then(lambda d: os.truncate(d / B, 20)), "cut off"),
    "shard empty": (then(lambda d: os.truncate(d / B, 0)), "cut off"),
    "link out of the directory": (link_out, "leads out"),
    "index links out": (link_index_out, "leads out"),
    "link to itself": (link_circle, "missing"),
    "tensor in no file": (with_map({"a": A, "b": A, "c": B, "d": B}), "tensor d is in the index but not"),
    "tensor not in the index": (with_map({"a": A, "c": B}), "tensor b is in the file but not"),
    "tensor in the wrong file": (with_map({"a": A, "b": B, "c": B}), "tensor b is in the wrong file"),
    "same tensor in both": (then(lambda d: write_file(d / B, "b", "c")), "tensor b is in the wrong file"),
    "tensor name climbs": (with_map({"../a": A, "b": A, "c": B}), "is called"),
    "tensor name with nul": (with_map({"a\0": A, "b": A, "c": B}), "is called"),
    "weight_map empty": (with_map({}), "weight_map"),
    "weight_map a list": (with_map([A, B]), "weight_map"),
    "weight_map missing": (raw_index(b"{}"), "weight_map"),
    "index a list": (raw_index(b"[]"), "object"),
    "index empty": (raw_index(b""), "JSON"),
    "index not utf-8": (raw_index(b'{"weight_map": "\xff"}'), "UTF-8"),
    "index deep": (raw_index(b'{"weight_map":' + b"[" * 100_000), "deep"),
    "index with nan": (raw_index(b'{"weight_map": NaN}'), "NaN"),
    "index with duplicates": (raw_index(b'{"weight_map": {"a": "' + A.encode() + b'", "a": "x"}}'), "twice"),
    "index a directory": (then(lambda d: ((d / INDEX_NAME).unlink(), (d / INDEX_NAME).mkdir())), "regular file"),
}


def snapshot(root: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in root.rglob("*")}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_directory_is_refused_and_nothing_written(name: str, tmp_path: Path) -> None:
    build, expected = HOSTILE[name]
    directory = tmp_path / "model"
    directory.mkdir()
    build(directory)
    before = snapshot(tmp_path)
    with pytest.raises(FormatError) as caught:
        ModelFiles(directory)
    assert expected in str(caught.value)
    assert str(caught.value).replace("\n", "").isprintable()
    assert snapshot(tmp_path) == before


def test_what_is_not_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path, expected in (
        (tmp_path / "none", "no such"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "a\0b", "no such"),
        (tmp_path / ("x" * 5000), "no such"),
    ):
        with pytest.raises(FormatError, match=expected):
            ModelFiles(path)


def test_shards_and_single_file(tmp_path: Path) -> None:
    honest(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(b"not ours")  # other files do not matter
    with ModelFiles(tmp_path) as files:
        assert set(files.tensors) == {"a", "b", "c"}
        assert [file.path.name for file in files.files] == [A, B]
        assert files.file("c").path.name == B
        with pytest.raises(FormatError, match=r"no tensor d\\x1b"):
            files.file("d\x1b")
    files.close()
    single = tmp_path / "single"
    single.mkdir()
    write_file(single / SINGLE_NAME, "w")
    with ModelFiles(single) as files:
        assert files.tensors["w"] == TensorInfo(DType.FLOAT32, (2, 3))


def test_links_inside_and_in_the_hugging_face_cache_are_followed(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write_file(blobs / "0123", "w")
    (snapshot / SINGLE_NAME).symlink_to("../../blobs/0123")
    with ModelFiles(snapshot) as files:
        assert set(files.tensors) == {"w"}
    (tmp_path / "link").symlink_to(snapshot)
    with ModelFiles(tmp_path / "link") as files:
        assert set(files.tensors) == {"w"}


def test_files_are_closed_when_the_directory_is_refused(tmp_path: Path) -> None:
    honest(tmp_path)
    os.truncate(tmp_path / B, 20)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(5):
        with pytest.raises(FormatError):
            ModelFiles(tmp_path)
    assert not before or len(os.listdir("/proc/self/fd")) == before


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10_000), new=st.binary(min_size=0, max_size=6), cut=st.integers(0, 6))
def test_mutated_index_is_read_or_refused(place: int, new: bytes, cut: int, tmp_path: Path) -> None:
    honest(tmp_path)
    raw = (tmp_path / INDEX_NAME).read_bytes()
    place %= len(raw)
    (tmp_path / INDEX_NAME).write_bytes(raw[:place] + new + raw[place + cut :])
    try:
        with ModelFiles(tmp_path) as files:
            assert set(files.tensors) == {"a", "b", "c"}
    except FormatError as error:
        assert str(tmp_path) in str(error)
