"""The safetensors header: honest files are read exactly, hostile ones refused by name, nothing else ever happens."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from skymoe.base.dtype import DType
from skymoe.base.errors import FormatError
from skymoe.weights.header import TensorFile, TensorInfo, is_safe_name, plan_file, write_all

F32 = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def container(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file with this header (an object or raw bytes), whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape: object = (2, 3), offsets: object = (0, 24)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


DATA = bytes(range(24))
HOSTILE = {
    "empty": b"",
    "three bytes": b"abc",
    "length only": bytes(8),
    "length beyond the file": container({}, length=1000),
    "length of 2**63": container({"w": F32}, DATA, length=2**63),
    "length of 2**64-1": container({"w": F32}, DATA, length=2**64 - 1),
    "not json": container(b"{'w': 1}"),
    "a list": container(b"[]"),
    "a string": container(b'"w"'),
    "leading space": container(b" {}"),
    "not utf-8": container(b'{"\xff\xfe": 1}'),
    "nan": container(b'{"w": NaN}'),
    "infinite": container(b'{"w": Infinity}'),
    "deep json": container(b'{"w":' * 50_000 + b"1" + b"}" * 50_000),
    "deep list": container(b'{"w":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "huge integer": container(b'{"w":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,24]}}', DATA),
    "duplicate tensor": container(
        b'{"w":' + json.dumps(F32).encode() + b',"w":' + json.dumps(F32).encode() + b"}", DATA
    ),
    "duplicate field": container(b'{"w":{"dtype":"F32","dtype":"F16","shape":[2,3],"data_offsets":[0,24]}}', DATA),
    "duplicate metadata": container(b'{"__metadata__":{"a":"1","a":"2"},"w":' + json.dumps(F32).encode() + b"}", DATA),
    "metadata of numbers": container({"__metadata__": {"a": 1}, "w": F32}, DATA),
    "metadata a list": container({"__metadata__": ["a"], "w": F32}, DATA),
    "name climbs": container({"../../etc/passwd": F32}, DATA),
    "name with nul": container({"w\0": F32}, DATA),
    "name with escape": container({"w\x1b[2J": F32}, DATA),
    "name with newline": container({"w\n": F32}, DATA),
    "name with surrogate": container(b'{"\\ud800":' + json.dumps(F32).encode() + b"}", DATA),
    "name empty": container({"": F32}, DATA),
    "name too long": container({"w" * 600: F32}, DATA),
    "name with space": container({"w w": F32}, DATA),
    "name not ascii": container({"wé": F32}, DATA),
    "entry a list": container({"w": [1, 2]}, DATA),
    "entry lacks dtype": container({"w": {"shape": [2, 3], "data_offsets": [0, 24]}}, DATA),
    "entry with extra field": container({"w": {**F32, "strides": [3, 1]}}, DATA),
    "dtype unknown": container({"w": entry("F31")}, DATA),
    "dtype a list": container({"w": {**F32, "dtype": ["F32"]}}, DATA),
    "shape negative": container({"w": entry(shape=[-2, -3])}, DATA),
    "shape a float": container({"w": entry(shape=[2.0, 3])}, DATA),
    "shape a bool": container({"w": entry(shape=[True, 6])}, DATA),
    "shape a number": container({"w": entry(shape=6)}, DATA),
    "shape overflows to zero": container({"w": entry(shape=[2**62, 0], offsets=[0, 0])}),
    "shape overflows": container({"w": entry(shape=[2**32, 2**32])}, DATA),
    "shape of too many dims": container({"w": entry(shape=[1] * 4000 + [6])}, DATA),
    "offsets reversed": container({"w": entry(offsets=[24, 0])}, DATA),
    "offsets negative": container({"w": entry(offsets=[-24, 0])}, DATA),
    "offsets three": container({"w": entry(offsets=[0, 24, 24])}, DATA),
    "offsets beyond the file": container({"w": entry(shape=[2, 4], offsets=[0, 32])}, DATA),
    "range too small": container({"w": entry(shape=[2, 2])}, DATA),
    "overlap": container({"a": entry(shape=[4], offsets=[0, 16]), "b": entry(shape=[4], offsets=[8, 24])}, DATA),
    "the same bytes twice": container({"a": F32, "b": F32}, DATA),
    "hole": container({"a": entry(shape=[2], offsets=[0, 8]), "b": entry(shape=[2], offsets=[16, 24])}, DATA),
    "hole in front": container({"a": entry(shape=[4], offsets=[8, 24])}, DATA),
    "trailing bytes": container({"w": F32}, DATA + b"x"),
    "data cut off": container({"w": F32}, DATA[:-1]),
    "no tensor but data": container({}, DATA),
    "a zip (torch.save)": b"PK\x03\x04" + bytes(200),
    "a pickle": b"\x80\x04\x95" + bytes(200),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(FormatError) as caught:
        TensorFile(path)
    assert str(path) in str(caught.value)
    assert str(caught.value).replace("\n", "").isprintable()
    assert len(str(caught.value)) < 2000
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dir").mkdir()
    for name in ("fifo", "dir", "missing"):
        with pytest.raises(FormatError, match=name):
            TensorFile(tmp_path / name)
    with pytest.raises(FormatError, match="regular"):
        TensorFile(Path("/dev/zero"))


def honest(tensors: dict[str, TensorInfo]) -> tuple[bytes, dict[str, bytes]]:
    prefix, header = plan_file(tensors, {"format": "pt"})
    data = {name: os.urandom(info.num_bytes) for name, info in tensors.items()}
    return prefix + b"".join(data[name] for name in header.tensors), data


ODD = {
    "b": TensorInfo(DType.BOOL, (3,)),
    "layers.0.w": TensorInfo(DType.BFLOAT16, (3, 5)),
    "scalar": TensorInfo(DType.FLOAT64, ()),
    "empty": TensorInfo(DType.FLOAT32, (0, 7)),
    "w/exp_avg": TensorInfo(DType.FLOAT32, (1, 1, 11)),
    "fp8": TensorInfo(DType.FLOAT8_E4M3, (13,)),
}


def test_round_trip_and_alignment(tmp_path: Path) -> None:
    raw, data = honest(ODD)
    path = tmp_path / "w.safetensors"
    path.write_bytes(raw)
    with TensorFile(path) as file:
        assert dict(file.header.tensors) == ODD
        assert file.header.metadata == {"format": "pt"}
        assert file.header.num_bytes == len(raw)
        for name, info in ODD.items():
            assert file.header.offsets[name] % info.dtype.itemsize == 0
            buffer = bytearray(info.num_bytes)
            file.read_into(name, memoryview(buffer))
            assert bytes(buffer) == data[name]
            assert b"".join(bytes(piece) for piece in file.chunks(name, 4)) == data[name]
            assert file.sha256(name) == hashlib.sha256(data[name]).hexdigest()
        part = bytearray(5)
        file.read_into("fp8", memoryview(part), start=7)
        assert bytes(part) == data["fp8"][7:12]


def test_the_reference_library_reads_what_we_plan(tmp_path: Path) -> None:
    tensors = {"w": TensorInfo(DType.INT16, (3, 5)), "b": TensorInfo(DType.FLOAT64, (7,))}
    raw, data = honest(tensors)
    (tmp_path / "w.safetensors").write_bytes(raw)
    with safe_open(tmp_path / "w.safetensors", "numpy") as file:
        assert file.get_tensor("w").tobytes() == data["w"]
        assert np.array_equal(file.get_tensor("b").view(np.uint8), np.frombuffer(data["b"], np.uint8))


def test_a_file_that_shrinks_under_the_reader(tmp_path: Path) -> None:
    raw, _ = honest(ODD)
    path = tmp_path / "w.safetensors"
    path.write_bytes(raw)
    with TensorFile(path) as file:
        os.truncate(path, len(raw) - 20)
        with pytest.raises(FormatError, match=r"fp8.*\n.*shrunk"):
            file.read_into("fp8", memoryview(bytearray(13)))


def test_names() -> None:
    good = ("w", "model.layers.0.mlp.experts.15.w1.weight", "a/exp_avg", "x" * 512, "_orig_mod.w", "0.weight")
    bad = ("", "..", "a..b", ".hidden", "/etc", "a b", "a\tb", "a\\b", 'a"b', "é", "a\x7f", "x" * 513, "a\n", "-rf")
    assert all(is_safe_name(name) for name in good)
    assert not any(is_safe_name(name) for name in bad)
    with pytest.raises(FormatError, match="cannot be called"):
        plan_file({"../x": TensorInfo(DType.INT8, (1,))}, {})


def test_write_all_survives_short_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:3]))
    with (tmp_path / "f").open("xb", buffering=0) as file:
        write_all(file, b"0123456789")
    assert (tmp_path / "f").read_bytes() == b"0123456789"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_headers_are_read_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    """Any damage to the header is a FormatError or a header that is still consistent with the file."""
    raw = bytearray(honest(ODD)[0])
    end = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, end - 1))
        kind = data.draw(st.sampled_from(("flip", "byte", "insert", "delete", "copy")))
        if kind == "flip":
            raw[place] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "byte":
            raw[place] = data.draw(st.integers(0, 255))
        elif kind == "insert":
            raw[place:place] = data.draw(st.sampled_from([b"0", b'"', b"-", b"{", b"9999999999", b"\\u0000", b"1e9"]))
        elif kind == "delete":
            del raw[place : place + data.draw(st.integers(1, 9))]
        else:
            raw[place:place] = raw[place : place + data.draw(st.integers(1, 60))]
    path = tmp_path / "w.safetensors"
    path.write_bytes(raw)
    try:
        with TensorFile(path) as file:
            assert sum(info.num_bytes for info in file.header.tensors.values()) <= len(raw)
            assert file.header.num_bytes == len(raw)
            for name in file.header.tensors:
                assert is_safe_name(name)
                file.sha256(name)
    except FormatError as error:
        assert str(path) in str(error)
