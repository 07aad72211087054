"""Whether a conversion may go on, and what it was made from."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from skymoe.base.dtype import DType
from skymoe.convert.identity import FileHashes, conversion_fingerprint
from skymoe.convert.parents import open_parent
from skymoe.convert.plan import Step, Target, Zeros, plan_of


def test_the_fingerprint_of_a_conversion(oracle, tmp_path: Path) -> None:
    directory = oracle.make(tmp_path / "dense", "llama")

    def now(name: str = "a", **options: object) -> str:
        plan = plan_of([Step(Zeros(), (Target(name, DType.FLOAT32, (2,)),))], [name])
        with open_parent(directory) as parent:
            return conversion_fingerprint(plan, [parent], options)

    first = now(seed=1)
    assert first == now(seed=1)
    assert len({first, now(seed=2), now("b", seed=1)}) == 3
    for name in ("model.safetensors", "config.json"):
        before = now(seed=1)
        state = (directory / name).stat()
        os.utime(directory / name, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
        assert before != now(seed=1)


def test_hashes_in_the_background(tmp_path: Path) -> None:
    contents = {"a": os.urandom(20_000_001), "b": b"short"}
    for name, content in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(content)
    with FileHashes([tmp_path / "a", tmp_path / "b", tmp_path / "a"]) as hashes:
        found = hashes.result()
    expected = [{"model.safetensors": hashlib.sha256(contents[name]).hexdigest()} for name in "aba"]
    assert list(found) == expected
    with pytest.raises(KeyError, match="mine"), FileHashes([tmp_path / "a"]):
        raise KeyError("mine")
    with FileHashes([tmp_path / "b"]) as hashes:
        pass
    with FileHashes([]) as hashes:
        assert hashes.result() == ()
