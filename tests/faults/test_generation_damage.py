"""Damage a generation in every way a disk, a copy or a person can: it is found by name, and the one before is used."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.generations import assert_whole, save

from skymoe.base.errors import CheckpointError
from skymoe.weights.generation import latest_generation, load_generation, verify_generation
from skymoe.weights.listing import list_generations
from skymoe.weights.manifest import LATEST_NAME, MANIFEST_NAME, read_manifest, seal

OLD, NEW = "step-00000010", "step-00000020"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for step in (10, 20):
        save(tmp_path / "root", step)
    return tmp_path / "root"


def assert_falls_back(root: Path, name: str) -> None:
    """The newest generation is refused, `name` is in the reason, and the older one is whole."""
    problems = verify_generation(root / NEW)
    assert problems and any(name in str(problem) for problem in problems), problems
    generation = latest_generation(root)
    assert generation is not None
    assert generation.step == 10
    assert_whole(generation)
    assert [directory for directory, _ in generation.skipped] == [NEW]
    assert name in generation.skipped[0][1]
    with pytest.raises(CheckpointError):
        load_generation(root / NEW)


def flip(path: Path, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


def flip_many(root: Path, count: int, seed: int) -> None:
    rng = random.Random(seed)
    manifest, _ = read_manifest(root / NEW)
    files = [MANIFEST_NAME, *manifest.files]
    for _ in range(count):
        name = rng.choice(files)
        path = root / NEW / name
        good = path.read_bytes()
        bit = rng.randrange(8 * len(good))
        flip(path, bit)
        problems = verify_generation(root / NEW)
        assert {problem.file for problem in problems} == {name}, f"bit {bit} of {name}"
        if name.endswith(".safetensors"):
            hit = [
                tensor
                for tensor, record in manifest.files[name].tensors.items()
                if record.offset <= bit // 8 < record.offset + len(good) and bit // 8 < record.offset + size_of(record)
            ]
            assert [problem.tensor for problem in problems] == (hit or [""]), f"bit {bit} of {name}"
        generation = latest_generation(root)
        assert generation is not None and generation.step == 10
        assert name in generation.skipped[0][1]
        path.write_bytes(good)
    assert verify_generation(root / NEW) == []


def size_of(record: object) -> int:
    size = record.dtype.itemsize
    for dim in record.shape:
        size *= dim
    return size


def test_a_flipped_bit_is_found_by_file_and_tensor(root: Path) -> None:
    flip_many(root, count=150, seed=0)


@pytest.mark.slow
def test_a_thousand_flipped_bits(root: Path) -> None:
    flip_many(root, count=1000, seed=1)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", MANIFEST_NAME])
@pytest.mark.parametrize(
    "damage", ["missing", "empty", "cut by one", "cut in half", "zeros", "longer", "directory", "link"]
)
def test_damaged_file(root: Path, name: str, damage: str) -> None:
    path = root / NEW / name
    good = path.read_bytes()
    path.unlink()
    if damage == "directory":
        path.mkdir()
    elif damage == "link":
        (root / "elsewhere").write_bytes(good if name != MANIFEST_NAME else good[:-1])
        path.symlink_to(root / "elsewhere")
    elif damage != "missing":
        damaged = {"empty": b"", "cut by one": good[:-1], "cut in half": good[: len(good) // 2], "longer": good + b"\0"}
        path.write_bytes(damaged.get(damage, bytes(len(good))))
    assert_falls_back(root, name)


def test_the_first_tensor_that_is_cut_off_is_named(root: Path) -> None:
    manifest, _ = read_manifest(root / NEW)
    record = manifest.files["model.safetensors"].tensors["half"]
    os.truncate(root / NEW / "model.safetensors", record.offset + 5)
    assert [problem.tensor for problem in verify_generation(root / NEW)] == ["half"]
    assert_falls_back(root, "half")


def test_an_extra_file(root: Path) -> None:
    (root / NEW / "model-2.safetensors").write_bytes(b"x")
    assert_falls_back(root, "model-2.safetensors")


def test_a_file_swapped_with_the_one_of_another_step(root: Path) -> None:
    shutil.copy(root / OLD / "model.safetensors", root / NEW / "model.safetensors")
    assert_falls_back(root, "is the file of step 10, not of step 20")


def test_a_file_swapped_within_the_generation(root: Path) -> None:
    shutil.copy(root / NEW / "optimizer.safetensors", root / NEW / "model.safetensors")
    assert_falls_back(root, "model.safetensors")


def test_a_document_of_another_step(root: Path) -> None:
    shutil.copy(root / OLD / "state.json", root / NEW / "state.json")
    assert_falls_back(root, "state.json")


def test_a_manifest_of_another_step(root: Path) -> None:
    shutil.copy(root / OLD / MANIFEST_NAME, root / NEW / MANIFEST_NAME)
    assert_falls_back(root, "is of step 10")


def test_directories_swapped(root: Path) -> None:
    for a, b in ((NEW, "x"), (OLD, NEW), ("x", OLD)):
        (root / a).rename(root / b)
    with pytest.raises(CheckpointError, match="is of step"):
        latest_generation(root)


def test_the_same_step_of_another_run(root: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "other", 20)
    shutil.rmtree(root / NEW)
    shutil.copytree(other, root / NEW)
    assert_falls_back(root, "another run")


def test_a_mix_with_an_older_save_of_the_same_step(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / NEW, tmp_path / "backup")
    save(root, 20)  # saved again: same step, same run, newer
    shutil.rmtree(root / NEW)
    shutil.copytree(tmp_path / "backup", root / NEW)
    assert_falls_back(root, "older or foreign copy")


def test_an_older_generation_replaced_by_a_fork_of_the_run(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "fork")
    for place in (root, tmp_path / "fork"):
        save(place, 30)
        save(place, 40)
    shutil.rmtree(root / "step-00000030")
    shutil.copytree(tmp_path / "fork" / "step-00000030", root / "step-00000030")
    damaged = {one.path.name: one.problems for one in list_generations(root).generations if one.problems}
    ours = json.loads((root / "step-00000040" / MANIFEST_NAME).read_text())["parent"]["manifest_sha256"]
    theirs = read_manifest(tmp_path / "fork" / "step-00000030")[1]
    assert bool(damaged) == (ours != theirs)  # the clocks of both saves may agree to the second: then they are equal


@pytest.mark.parametrize("number", range(24))
def test_damaged_latest_is_told_and_survived(root: Path, number: int) -> None:
    size = (root / LATEST_NAME).stat().st_size
    flip(root / LATEST_NAME, random.Random(number).randrange(8 * size))
    generation = latest_generation(root)
    assert generation is not None and generation.step == 20
    assert [name for name, _ in generation.skipped] == [LATEST_NAME]
    save(root, 30)
    generation = latest_generation(root)
    assert generation is not None and generation.step == 30 and not generation.skipped


def test_latest_is_gone(root: Path) -> None:
    (root / LATEST_NAME).unlink()
    generation = latest_generation(root)
    assert generation is not None and generation.step == 20 and not generation.skipped


def test_the_newest_generation_is_gone(root: Path) -> None:
    shutil.rmtree(root / NEW)
    generation = latest_generation(root)
    assert generation is not None and generation.step == 10
    assert "not there" in generation.skipped[0][1]


def test_nothing_intact_is_an_error_and_not_a_fresh_start(root: Path) -> None:
    for name in (OLD, NEW):
        flip(root / name / "model.safetensors", 8 * 500)
    with pytest.raises(CheckpointError, match=r"no checkpoint here is intact(.|\n)*step-00000020(.|\n)*step-00000010"):
        latest_generation(root)
    shutil.rmtree(root / OLD)
    shutil.rmtree(root / NEW)
    with pytest.raises(CheckpointError, match="not there"):
        latest_generation(root)


def forged(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """A manifest with a right digest and a wrong content."""

    def forge(path: Path) -> None:
        content = json.loads(path.read_text())
        del content["digest"]
        change(content)
        path.write_bytes(seal(content))

    return forge


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(version=2),
        lambda m: m.update(format="other"),
        lambda m: m.update(step=-1),
        lambda m: m.update(step=True),
        lambda m: m.update(extra=1),
        lambda m: m.pop("files"),
        lambda m: m["files"].update({"../../etc/passwd.json": m["files"]["state.json"]}),
        lambda m: m["files"].update({"a\0.json": m["files"]["state.json"]}),
        lambda m: m["files"]["state.json"].update(bytes=2**70),
        lambda m: m["files"]["state.json"].update(bytes="10"),
        lambda m: m["files"]["state.json"].update(sha256="xyz"),
        lambda m: m["files"]["model.safetensors"]["tensors"]["w"].update(dtype="complex64"),
        lambda m: m["files"]["model.safetensors"]["tensors"]["w"].update(shape=[-1]),
    ],
)
def test_a_forged_manifest_is_refused(root: Path, change: Callable[[dict], object]) -> None:
    forged(change)(root / NEW / MANIFEST_NAME)
    assert_falls_back(root, MANIFEST_NAME)


def test_damage_between_verifying_and_loading_is_found(root: Path) -> None:
    generation = latest_generation(root)
    assert generation is not None
    offset = generation.manifest.files["model.safetensors"].tensors["half"].offset
    flip(generation.path / "model.safetensors", 8 * offset)
    flip(generation.path / "state.json", 9)
    with pytest.raises(CheckpointError, match="tensor half"):
        generation.tensors("model")
    with pytest.raises(CheckpointError, match=r"state\.json"):
        generation.document("state")
