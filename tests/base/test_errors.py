from __future__ import annotations

import pytest

from skymoe.base.dtype import DType
from skymoe.base.errors import MissingExtraError, SkymoeError, printable


def test_a_message_answers_what_where_why_and_what_next() -> None:
    error = SkymoeError("the file is empty", where="a/b.bin", why="it was cut", hint="copy it again")
    assert str(error) == "a/b.bin: the file is empty\n  why: it was cut\n  try: copy it again"
    assert str(SkymoeError("no")) == "no"
    assert 'pip install "skymoe[report]"' in str(MissingExtraError("skymoe report", "report"))


@pytest.mark.parametrize(
    ("hostile", "shown"), [("a\x1b[31mb", "a\\x1b[31mb"), ("a\nb", "a\\nb"), ("\x00", "\\x00"), ("é\u202e", "é\\u202e")]
)
def test_hostile_names_are_escaped(hostile: str, shown: str) -> None:
    assert printable(hostile) == shown
    assert len(printable("x" * 10_000)) < 400


def test_no_control_character_leaves_an_error() -> None:
    error = SkymoeError("a\x1b[2J\nb", where="c\x07", why="d\x00" * 50, hint="\u202ee")
    assert str(error) == "c\\x07: a\\x1b[2J\nb\n  why: " + "d\\x00" * 50 + "\n  try: \\u202ee"
    assert error.what == "a\\x1b[2J\nb"


def test_dtype_names_are_torchs_and_safetensors() -> None:
    torch = pytest.importorskip("torch")
    for dtype in DType:
        assert getattr(torch, dtype).itemsize == dtype.itemsize
        assert DType.from_safetensors(dtype.safetensors_name) is dtype
