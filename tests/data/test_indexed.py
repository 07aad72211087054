from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skymoe.base.errors import ConfigError, FormatError
from skymoe.data.indexed import IndexedDataset, IndexedWriter
from skymoe.data.layout import token_dtype

# Three sequences in two documents, as Megatron's IndexedDatasetBuilder writes them: [7, 8, 9] + [1], then [300, 2].
INDEX = (
    b"MMIDIDX\x00\x00"
    b"\x01\x00\x00\x00\x00\x00\x00\x00"  # version
    b"\x08"  # uint16
    b"\x03\x00\x00\x00\x00\x00\x00\x00"  # sequences
    b"\x03\x00\x00\x00\x00\x00\x00\x00"  # document indices
    b"\x03\x00\x00\x00\x01\x00\x00\x00\x02\x00\x00\x00"  # lengths
    b"\x00\x00\x00\x00\x00\x00\x00\x00\x06\x00\x00\x00\x00\x00\x00\x00\x08\x00\x00\x00\x00\x00\x00\x00"  # offsets
    b"\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x00\x00\x00\x00"  # documents
)
TOKENS = b"\x07\x00\x08\x00\x09\x00\x01\x00\x2c\x01\x02\x00"


def place(prefix: Path, index: bytes = INDEX, tokens: bytes = TOKENS) -> Path:
    prefix.with_name(prefix.name + ".idx").write_bytes(index)
    prefix.with_name(prefix.name + ".bin").write_bytes(tokens)
    return prefix


def test_writer_gives_megatrons_bytes(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_sequence([7, 8, 9])
        writer.add_sequence([1])
        writer.end_document()
        writer.add_document([300, 2])
        writer.finish()
    assert (tmp_path / "x.idx").read_bytes() == INDEX
    assert (tmp_path / "x.bin").read_bytes() == TOKENS
    assert sorted(os.listdir(tmp_path)) == ["x.bin", "x.idx", "x.json"]


def test_reader_takes_megatrons_bytes(tmp_path: Path) -> None:
    data = IndexedDataset(place(tmp_path / "web-0.5"))  # the dot is part of the name
    assert (data.num_tokens, data.num_documents, data.dtype) == (6, 2, np.dtype("<u2"))
    assert data.document(0).tolist() == [7, 8, 9, 1]
    assert data.document(1).tolist() == [300, 2]
    assert data.document_bounds.tolist() == [0, 4, 6]
    assert data.sidecar is None and data.fingerprint.startswith("index:")
    with pytest.raises(IndexError):
        data.document(2)
    with pytest.raises(ValueError, match="read-only"):
        data.tokens[0] = 1


@pytest.mark.parametrize(
    ("code", "dtype"),
    enumerate(("uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16"), start=1),
)
def test_dtype_codes(tmp_path: Path, code: int, dtype: str) -> None:
    with IndexedWriter(tmp_path / "x", dtype) as writer:
        writer.add_document([1, 2, 3])
        writer.add_document([100])
        writer.finish()
    assert (tmp_path / "x.idx").read_bytes()[17] == code
    assert IndexedDataset(tmp_path / "x").document(0).tolist() == [1, 2, 3]
    assert (tmp_path / "x.bin").read_bytes() == np.array([1, 2, 3, 100], dtype).tobytes()


def test_dtype_of_a_vocabulary_is_megatrons() -> None:
    assert [token_dtype(size).name for size in (2048, 65_499, 65_500, 128_256)] == [
        "uint16",
        "uint16",
        "int32",
        "int32",
    ]


@given(st.lists(st.lists(st.integers(0, 2**16 - 1), max_size=9), max_size=9))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]]) -> None:
    prefix = tmp_path_factory.mktemp("d") / "x"
    with IndexedWriter(prefix, "uint16") as writer:
        for document in documents:
            writer.add_document(document)
        sidecar = writer.finish(name="n", text_bytes=5, tokenizer_sha256="f" * 64)
    data = IndexedDataset(prefix)
    assert [data.document(i).tolist() for i in range(data.num_documents)] == documents
    assert data.sidecar == sidecar and sidecar.tokens == sum(map(len, documents)) and sidecar.bytes == 5
    data.verify()


def test_fingerprint_is_of_the_content(tmp_path: Path, write_tokens) -> None:
    one, same, other = (write_tokens(*args) for args in (("a", [[1, 2]]), ("b", [[1, 2]]), ("c", [[1], [2]])))
    assert IndexedDataset(one).fingerprint == IndexedDataset(same).fingerprint != IndexedDataset(other).fingerprint


def test_nothing_is_left_of_a_write_that_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), IndexedWriter(tmp_path / "x", "uint16") as writer:
        writer.add_document([1])
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_writer_refuses(tmp_path: Path, write_tokens) -> None:
    write_tokens("taken", [[1]])
    with pytest.raises(ConfigError, match="exist already"):
        IndexedWriter(tmp_path / "taken", "uint16")
    with pytest.raises(ConfigError, match="cannot be stored"):
        IndexedWriter(tmp_path / "y", "uint32")
    with IndexedWriter(tmp_path / "y", "uint16") as writer:
        for wrong in ([65_536], [-1], np.array([70_000], np.int32)):
            with pytest.raises(FormatError, match="does not fit"):
                writer.add_document(wrong)
        with pytest.raises(FormatError, match="shape"):
            writer.add_document([[1]])


def test_a_flipped_bit_is_found_by_verify(tmp_path: Path, write_tokens) -> None:
    prefix = write_tokens("x", [[1, 2, 3]])
    (tmp_path / "x.bin").write_bytes(b"\x01\x00\x03\x00\x03\x00")
    data = IndexedDataset(prefix)  # cannot be seen without reading everything
    with pytest.raises(FormatError, match="changed"):
        data.verify()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 7}, "belongs to other files"),
        ({"documents": -1}, "documents"),
        ({"fingerprint": "short"}, "fingerprint"),
        ({"tokens": "6"}, "tokens"),
        ({"tokens": True}, "tokens"),
    ],
)
def test_a_wrong_sidecar_is_refused(tmp_path: Path, write_tokens, changes: dict[str, object], message: str) -> None:
    prefix = write_tokens("x", [[7, 8, 9, 1], [300, 2]])
    path = tmp_path / "x.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(FormatError, match=message):
        IndexedDataset(prefix)


def change(offset: int, data: bytes) -> bytes:
    return INDEX[:offset] + data + INDEX[offset + len(data) :]


@pytest.mark.parametrize(
    ("index", "tokens", "message"),
    [
        (b"", TOKENS, "MMIDIDX"),
        (INDEX[:33], TOKENS, "MMIDIDX"),
        (change(0, b"X"), TOKENS, "MMIDIDX"),
        (change(9, b"\x02"), TOKENS, "version 2"),
        (change(17, b"\x00"), TOKENS, "dtype code 0"),
        (change(17, b"\x09"), TOKENS, "dtype code 9"),
        (change(17, b"\x04"), TOKENS, "offsets"),  # int32: the offsets were for two bytes
        (change(18, b"\xff" * 8), TOKENS, "counts say"),
        (change(26, b"\xff" * 8), TOKENS, "counts say"),
        (INDEX[:-1], TOKENS, "counts say"),
        (INDEX + b"\x00" * 3, TOKENS, "multimodal"),
        (change(34, b"\xff" * 4), TOKENS, "negative"),
        (change(34, b"\xff\xff\xff\x7f"), TOKENS, "offsets"),
        (change(54, b"\x04"), TOKENS, "offsets"),
        (change(42, b"\x03"), TOKENS, "12 bytes|14 bytes|holds 12"),
        (INDEX, TOKENS[:-1], "holds 11"),
        (INDEX, TOKENS + b"\x00\x00", "holds 14"),
        (INDEX, b"", "holds 0"),
        (change(70, b"\x01"), TOKENS, "document indices"),
        (change(78, b"\x04"), TOKENS, "document indices"),
        (change(86, b"\x02"), TOKENS, "document indices"),
        (change(78, b"\xff" * 8), TOKENS, "document indices"),
    ],
)
def test_hostile_files_are_refused(tmp_path: Path, index: bytes, tokens: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        IndexedDataset(place(tmp_path / "x", index, tokens))


def test_missing_and_special_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="No such file"):
        IndexedDataset(tmp_path / "none")
    place(tmp_path / "x")
    (tmp_path / "x.bin").unlink()
    with pytest.raises(FormatError, match=r"x\.bin"):
        IndexedDataset(tmp_path / "x")
    os.mkfifo(tmp_path / "x.bin")
    with pytest.raises(FormatError, match="not a regular file"):
        IndexedDataset(tmp_path / "x")


@given(
    st.lists(st.tuples(st.integers(0, len(INDEX) - 1), st.integers(0, 255)), max_size=6),
    st.integers(0, len(INDEX) + 20),
    st.integers(0, len(TOKENS) + 4),
)
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_mutated_files_open_whole_or_give_a_format_error(
    tmp_path: Path, edits: list[tuple[int, int]], index_length: int, tokens_length: int
) -> None:
    index = bytearray(INDEX)
    for offset, value in edits:
        index[offset] = value
    place(
        tmp_path / "x", bytes(index).ljust(index_length, b"\0")[:index_length], TOKENS.ljust(16, b"\0")[:tokens_length]
    )
    try:
        data = IndexedDataset(tmp_path / "x")
    except FormatError:
        return
    assert sum(len(data.document(i)) for i in range(data.num_documents)) == data.num_tokens
