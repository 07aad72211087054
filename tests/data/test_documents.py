from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skymoe.base.errors import FormatError
from skymoe.data.config import BadDocument, BuildConfig, InputFormat, TextUnit
from skymoe.data.documents import DocumentReader, list_inputs
from skymoe.data.streams import cut_long, pieces


def read(tmp_path: Path, *inputs: Path, **changes: object) -> list[str]:
    config = BuildConfig(inputs=inputs or (tmp_path,), out=tmp_path / "out", **changes)
    reader = DocumentReader(config)
    return [text for file in list_inputs(config) for text in reader.read(file)]


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        (TextUnit.FILE, ["a\nb\n\n\nc\n"]),
        (TextUnit.PARAGRAPH, ["a\nb\n", "c\n"]),
        (TextUnit.LINE, ["a\n", "b\n", "c\n"]),
    ],
)
def test_units_of_txt(tmp_path: Path, unit: TextUnit, expected: list[str]) -> None:
    (tmp_path / "x.txt").write_text("a\nb\n\n\nc\n")
    assert read(tmp_path, text_unit=unit) == expected


def test_a_directory_is_read_in_order_by_suffix(tmp_path: Path) -> None:
    (tmp_path / "src" / ".git").mkdir(parents=True)
    (tmp_path / "src" / "b.py").write_text("b")
    (tmp_path / "src" / ".git" / "x.py").write_text("hidden")
    (tmp_path / "src" / "a.jsonl").write_text('{"text": "a1"}\n\n{"text": "a2"}\n')
    (tmp_path / "src" / "c.bin").write_bytes(b"\x00")
    (tmp_path / "src" / "d.txt.gz").write_bytes(gzip.compress(b"d"))
    (tmp_path / "src" / "e.py").symlink_to(tmp_path / "src" / "b.py")
    assert read(tmp_path, tmp_path / "src") == ["a1", "a2", "b", "d"]
    assert read(tmp_path, tmp_path / "src", format=InputFormat.SOURCE) == ["b"]
    assert read(tmp_path, tmp_path / "src", format=InputFormat.SOURCE, extensions=(".bin", ".py")) == ["b"]
    assert read(tmp_path, tmp_path / "src" / "c.bin", tmp_path / "src" / "b.py", format=InputFormat.SOURCE) == ["b"]


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"row {i}" for i in range(600)]
    parquet.write_table(arrow.table({"body": texts, "n": list(range(600))}), tmp_path / "x.parquet")
    assert read(tmp_path, text_key="body") == texts
    with pytest.raises(FormatError, match="no column 'text'; there are: body, n"):
        read(tmp_path)
    with pytest.raises(FormatError, match="without text"):
        read(tmp_path, text_key="n")
    data = (tmp_path / "x.parquet").read_bytes()
    for broken in (b"", data[:100], data[:-20], b"PAR1" + data[50:]):
        (tmp_path / "x.parquet").write_bytes(broken)
        with pytest.raises(FormatError, match=r"x\.parquet"):
            read(tmp_path, text_key="body")


BAD_LINES = [b'{"text": 1}', b"{}", b"[]", b"{", b'{"text": "\\ud800"}', b"\xff", b'{"text": "a", "text": "b"}', b"NaN"]


@pytest.mark.parametrize("line", [*BAD_LINES, b"[" * 100_000])
def test_bad_lines_are_named_or_counted(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(FormatError, match=r"x\.jsonl:2.*|(?s:.*skip)"):
        read(tmp_path)
    config = BuildConfig(inputs=(tmp_path,), out=tmp_path / "out", bad_documents=BadDocument.SKIP)
    reader = DocumentReader(config)
    assert [t for f in list_inputs(config) for t in reader.read(f)] == ["good"]
    assert sum(reader.skipped.values()) == 1


def test_what_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"caf\xe9")
    with pytest.raises(FormatError, match="not UTF-8"):
        read(tmp_path)
    assert read(tmp_path, bad_documents=BadDocument.SKIP) == []
    (tmp_path / "x.txt").rename(tmp_path / "x.py")  # among sources it is just not one
    (tmp_path / "y.py").write_bytes(b"a\x00b")
    (tmp_path / "z.py").write_text("z")
    assert read(tmp_path) == ["z"]
    (tmp_path / "w.txt.gz").write_bytes(b"no gzip")
    with pytest.raises(FormatError, match=r"w\.txt\.gz"):
        read(tmp_path)
    (tmp_path / "w.txt.gz").write_bytes(gzip.compress(b"x" * 5000)[:-12])
    with pytest.raises(FormatError, match=r"w\.txt\.gz"):
        read(tmp_path)


def test_inputs_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such file"):
        read(tmp_path, tmp_path / "none")
    with pytest.raises(FormatError, match="no file to read"):
        read(tmp_path)
    (tmp_path / "x.weird").write_text("x")
    with pytest.raises(FormatError, match="suffix"):
        read(tmp_path, tmp_path / "x.weird")
    assert read(tmp_path, tmp_path / "x.weird", format=InputFormat.TXT) == ["x"]


@given(st.text(st.sampled_from("ab\n\u00e9\u4e2d\U0001f600"), max_size=80), st.integers(4, 40))
def test_long_texts_are_cut_between_characters_and_nothing_is_lost(text: str, limit: int) -> None:
    parts = list(cut_long(text, limit))
    assert "".join(parts) == text
    assert all(len(part.encode()) <= limit for part in parts)
    streamed = list(pieces(io.BytesIO(text.encode()), limit))
    assert "".join(piece.decode() for piece in streamed) == text and all(len(piece) <= limit for piece in streamed)


def test_long_documents_are_cut_at_line_ends(tmp_path: Path) -> None:
    lines = [f"line {i:04d}\n" for i in range(1000)]
    (tmp_path / "x.txt").write_text("".join(lines))
    (tmp_path / "y.jsonl").write_text(json.dumps({"text": "".join(lines)}))
    documents = read(tmp_path, max_document_bytes=1024)
    assert "".join(documents) == "".join(lines) * 2
    assert all(document.endswith("\n") and len(document) <= 1024 for document in documents)
