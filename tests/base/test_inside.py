"""Links stay in the directory, sizes are bounded, what is no file is not opened."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from skymoe.base.errors import FormatError
from skymoe.base.inside import inside, read_inside
from skymoe.base.strict_json import parse_json


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "home" / "file").write_text("content")
    return tmp_path / "home"


def test_files_and_links_within(home: Path) -> None:
    (home / "link").symlink_to("file")
    assert read_inside(home, "file", max_bytes=7) == read_inside(home, "link", max_bytes=7) == b"content"
    assert read_inside(home, "nothing", max_bytes=7) is None
    with pytest.raises(FormatError, match="larger than 6 bytes"):
        read_inside(home, "file", max_bytes=6)


@pytest.mark.parametrize("target", ["../secret", "/etc/passwd", "sub/file", "../home2/file"])
def test_links_out(home: Path, target: str) -> None:
    for folder in (home / "sub", home.parent / "home2"):
        folder.mkdir()
        (folder / "file").write_text("other")
    (home / "link").symlink_to(target)
    with pytest.raises(FormatError, match="leads out"):
        read_inside(home, "link", max_bytes=100)


def test_links_nowhere_circles_and_what_is_no_file(home: Path) -> None:
    (home / "circle").symlink_to("circle")
    (home / "nowhere").symlink_to("not-there")
    os.mkfifo(home / "fifo")
    (home / "folder").mkdir()
    for name, problem in (("circle", "missing"), ("nowhere", "missing"), ("fifo", "regular"), ("folder", "regular")):
        with pytest.raises(FormatError, match=problem) as caught:
            read_inside(home, name, max_bytes=100)
        assert name in str(caught.value)


def test_the_cache_of_hugging_face(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "0123").write_text("content")
    (snapshot / "file").symlink_to("../../blobs/0123")
    assert inside(snapshot, "file") == (blobs / "0123").resolve()
    assert read_inside(snapshot, "file", max_bytes=99) == b"content"


def test_depth() -> None:
    assert parse_json(b"[" * 32 + b"]" * 32, where="x")
    for data in (b"[" * 34 + b"]" * 34, b'{"a":' * 900 + b"1" + b"}" * 900, b"[" * 200_000 + b"]" * 200_000):
        with pytest.raises(FormatError, match="nested"):
            parse_json(data, where="x")


@pytest.mark.parametrize("number", ["1e400", "-1e999", "1" + "0" * 400 + ".0"])
def test_numbers_that_cannot_be_written_again(number: str) -> None:
    with pytest.raises(FormatError, match="too large"):
        parse_json(f'{{"a": {number}}}'.encode(), where="x")
    assert parse_json(b'{"a": 1e308}', where="x") == {"a": 1e308}
