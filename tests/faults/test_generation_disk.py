"""A disk that refuses: the save fails, removes what it began, and the generation before is intact."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.generations import assert_whole, in_child, interposed, save, state_of

from skymoe.base.errors import FormatError, MachineError
from skymoe.weights.generation import latest_generation, save_generation
from skymoe.weights.publish import leftovers


def assert_untouched(root: Path) -> None:
    generation = latest_generation(root)
    assert generation is not None
    assert_whole(generation)
    assert not generation.skipped


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_an_error_of_any_system_call(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The n-th call fails, for every n."""
    failed, steps = 0, set()
    for number in range(1, 200):
        root = tmp_path / str(number)
        save(root, 10, keep=1)
        count = 0

        def refuse(name: str, args: tuple, number: int = number) -> None:
            nonlocal count
            count += 1
            if count == number:
                raise OSError(code, os.strerror(code), str(args[0]))

        with monkeypatch.context() as patch:
            for name, call in interposed(refuse).items():
                patch.setattr(os, name, call)
            try:
                save(root, 20, keep=1)
            except MachineError as error:
                failed += 1
                assert os.strerror(code) in str(error)
                assert error.exit_code == 3
        assert_untouched(root)
        generation = latest_generation(root)
        assert generation is not None
        steps.add(generation.step)
        save(root, 30, keep=1)
        assert_untouched(root)
        assert not leftovers(root)
        if count < number:
            break
    assert failed > 10
    assert steps == {10, 20}


def test_a_disk_that_stays_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the n-th write on every write fails, while removing still works."""
    save(tmp_path, 10)

    for start in range(1, 10):  # as many writes as the save has
        writes = iter(range(1, 100))

        def refuse(name: str, args: tuple, start: int = start, writes: Iterator[int] = writes) -> None:
            if name == "write" and next(writes) >= start:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            for name, call in interposed(refuse).items():
                patch.setattr(os, name, call)
            with pytest.raises(MachineError, match="No space left"):
                save(tmp_path, 20)
        assert not leftovers(tmp_path)
        assert sorted(os.listdir(tmp_path)) == ["LATEST", "step-00000010"]
    assert_untouched(tmp_path)


@pytest.mark.parametrize("limit", [0, 1, 100, 400, 900, 1500])
def test_file_size_limit(limit: int, tmp_path: Path) -> None:
    """RLIMIT_FSIZE: the kernel itself cuts the write short."""
    save(tmp_path, 10)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            save(tmp_path, 20)
        except MachineError:
            os._exit(3)

    assert in_child(work) == 3
    assert sorted(os.listdir(tmp_path)) == ["LATEST", "step-00000010"]
    assert_untouched(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or not mount:
        pytest.skip("mounting needs root")
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_full_disk_is_told_before_the_first_byte(small_disk: Path) -> None:
    big = {"model": {"w": state_of(1)["model"]["w"].repeat(40, 10)}}
    with pytest.raises(MachineError, match=r"not enough space: .* needed"):
        save_generation(small_disk / "root", 10, tensors=big, documents={}, layout={})
    assert os.listdir(small_disk / "root") == []


def test_really_full_disk(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The space is taken by somebody else after it was counted."""
    monkeypatch.setattr("skymoe.weights.staged.ensure_free_space", lambda directory, num_bytes: None)
    root = small_disk / "root"
    save(root, 10)
    free = shutil.disk_usage(small_disk).free
    (small_disk / "other").write_bytes(bytes(max(free - 4096, 0)))
    for _ in range(3):
        with pytest.raises(MachineError, match="No space left"):
            save(root, 20)
        assert sorted(os.listdir(root)) == ["LATEST", "step-00000010"]
        assert_untouched(root)
    (small_disk / "other").unlink()
    save(root, 20, keep=1)
    assert_untouched(root)


def test_the_estimate_is_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("skymoe.weights.staged.ensure_free_space", lambda _, num_bytes: asked.append(num_bytes))
    weight = state_of(1)["model"]["w"].repeat(300, 100)
    path = save_generation(tmp_path, 1, tensors={"model": {"w": weight}}, documents={}, layout={})
    written = sum(file.stat().st_size for file in path.iterdir())
    assert written <= asked[0] <= 1.01 * written


def test_root_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(MachineError):
        save(tmp_path / "file" / "root", 10)


def test_what_cannot_be_stored_leaves_nothing(tmp_path: Path) -> None:
    tensors = state_of(1)["model"]
    for bad in ({"w": tensors["w"].cfloat()}, {"a b": tensors["w"]}):
        with pytest.raises(FormatError):
            save_generation(tmp_path / "root", 1, tensors={"model": bad}, documents={}, layout={})
    with pytest.raises(TypeError):
        save_generation(tmp_path / "root", 1, tensors={}, documents={"state": object()}, layout={})
    assert not (tmp_path / "root").exists()
