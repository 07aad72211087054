"""The digest at the end of MANIFEST.json and LATEST: every flipped bit, cut or splice in them is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest

from skymoe.base.errors import CheckpointError
from skymoe.weights.manifest import LATEST_NAME, Latest, generation_name, read_latest, sealed

LATEST = Latest(generation="step-00000120", step=120, serial=7, run="0" * 32, manifest_sha256="ab" * 32)


def test_round_trip(tmp_path: Path) -> None:
    assert read_latest(tmp_path) is None
    (tmp_path / LATEST_NAME).write_bytes(sealed(LATEST))
    assert read_latest(tmp_path) == LATEST
    assert sealed(LATEST) == sealed(LATEST)


def test_every_single_flipped_bit_is_noticed(tmp_path: Path) -> None:
    good = sealed(LATEST)
    for bit in range(8 * len(good)):
        raw = bytearray(good)
        raw[bit // 8] ^= 1 << bit % 8
        (tmp_path / LATEST_NAME).write_bytes(raw)
        with pytest.raises(CheckpointError, match="LATEST: damaged"):
            read_latest(tmp_path)


@pytest.mark.parametrize(
    "change",
    [lambda b: b"", lambda b: b[:-1], lambda b: b + b" ", lambda b: b[1:], lambda b: b * 2, lambda b: b.upper()],
)
def test_cuts_and_splices_are_noticed(change, tmp_path: Path) -> None:
    (tmp_path / LATEST_NAME).write_bytes(change(sealed(LATEST)))
    with pytest.raises(CheckpointError, match="damaged"):
        read_latest(tmp_path)


def test_what_is_not_a_file(tmp_path: Path) -> None:
    (tmp_path / LATEST_NAME).mkdir()
    with pytest.raises(CheckpointError, match="missing"):
        read_latest(tmp_path)


def test_a_newer_format_says_so(tmp_path: Path) -> None:
    newer = Latest.model_construct(**{**LATEST.model_dump(), "version": 2})
    (tmp_path / LATEST_NAME).write_bytes(sealed(newer))
    with pytest.raises(CheckpointError, match=r"version(.|\n)*the version of skymoe that wrote it"):
        read_latest(tmp_path)


def test_names_sort_like_steps() -> None:
    assert generation_name(120) == "step-00000120"
    assert generation_name(10**9) == "step-1000000000"
