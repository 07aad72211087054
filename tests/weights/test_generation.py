"""Generations when nothing goes wrong: what is saved returns bit for bit, in order, and old ones go."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from skymoe.base.dtype import DType
from skymoe.base.errors import CheckpointError
from skymoe.weights.buffers import torch_dtype
from skymoe.weights.generation import latest_generation, load_generation, save_generation, verify_generation
from skymoe.weights.listing import list_generations
from skymoe.weights.manifest import read_manifest


def save(root: Path, step: int, *, keep: int = 3, value: float | None = None) -> Path:
    tensors = {"model": {"w": torch.full((3, 5), float(step) if value is None else value)}}
    return save_generation(
        root, step, tensors=tensors, documents={"state": {"step": step}}, layout={"pp": 1}, keep=keep
    )


def steps(root: Path) -> list[int]:
    return [one.step for one in list_generations(root).generations]


def test_everything_returns_bit_for_bit(tmp_path: Path) -> None:
    special = torch.tensor([math.nan, -0.0, math.inf, 1e-45])
    model = {f"t.{dtype}": torch.arange(15).reshape(3, 5).to(torch_dtype(dtype)) for dtype in DType}
    model |= {
        "special": special,
        "scalar": torch.tensor(3),
        "empty": torch.zeros(4, 0),
        "view": torch.arange(12.0)[::3],
    }
    model["grad"] = torch.nn.Parameter(torch.randn(3, 7).t())
    big = {"w/exp_avg": torch.randn(300, 401), "w/step": torch.tensor(7.0)}  # above the size where threads hash
    document = {
        "alpha": [0.1, 1 / 3],
        "nan": math.nan,
        "text": "ä\n",
        "none": None,
        "big": 2**63 - 1,
        "nested": {"a": []},
    }
    path = save_generation(
        tmp_path,
        12,
        tensors={"model": model, "optimizer": big, "none": {}},
        documents={"state": document},
        layout={"tp": 2},
    )
    assert path == tmp_path / "step-00000012"
    generation = latest_generation(tmp_path)
    assert generation is not None
    assert (generation.step, generation.path, generation.skipped) == (12, path, ())
    for stem, tensors in (("model", model), ("optimizer", big), ("none", {})):
        loaded = generation.tensors(stem)
        assert loaded.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
            flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
            assert torch.equal(loaded[name].view(-1).view(torch.uint8), flat), name
    assert repr(generation.document("state")) == repr(document)
    assert generation.manifest.layout == {"tp": 2}
    assert generation.manifest.torch == torch.__version__


def test_files_are_plain_safetensors_and_json(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    assert sorted(file.name for file in path.iterdir()) == ["MANIFEST.json", "model.safetensors", "state.json"]
    assert torch.equal(load_file(path / "model.safetensors")["w"], torch.full((3, 5), 3.0))


def test_what_is_loaded_is_not_the_memory_that_was_saved(tmp_path: Path) -> None:
    tensor = torch.ones(3)
    save_generation(tmp_path, 1, tensors={"model": {"w": tensor}}, documents={}, layout={})
    tensor.zero_()
    generation = load_generation(tmp_path / "step-00000001")
    generation.tensors("model")["w"].fill_(9)
    assert torch.equal(generation.tensors("model")["w"], torch.ones(3))


def test_keep_and_order(tmp_path: Path) -> None:
    for step in (1, 2, 5, 9, 100_000_000):
        save(tmp_path, step, keep=3)
    assert steps(tmp_path) == [100_000_000, 9, 5]
    save(tmp_path, 100_000_001, keep=1)
    assert steps(tmp_path) == [100_000_001]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step-100000001"]


def test_a_damaged_one_does_not_count_as_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    (tmp_path / "step-00000003" / "MANIFEST.json").write_text("{}")
    save(tmp_path, 4, keep=3)
    assert steps(tmp_path) == [4, 3, 2, 1]
    save(tmp_path, 5, keep=2)
    assert steps(tmp_path) == [5, 4]


def test_saving_a_step_again_replaces_it_and_what_followed(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    rolled_back = latest_generation(tmp_path, max_step=19)
    assert rolled_back is not None and rolled_back.step == 10
    save(tmp_path, 20, value=-1.0)
    assert steps(tmp_path) == [20, 10]
    generation = latest_generation(tmp_path)
    assert generation is not None and generation.step == 20
    assert torch.equal(generation.tensors("model")["w"], torch.full((3, 5), -1.0))
    save(tmp_path, 40)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "LATEST",
        "step-00000010",
        "step-00000020",
        "step-00000040",
    ]


def test_another_run_is_not_touched(tmp_path: Path) -> None:
    for step in (50, 60):
        save(tmp_path / "other", step)
    save(tmp_path / "root", 10)
    (tmp_path / "other" / "step-00000060").rename(tmp_path / "root" / "step-00000060")
    save(tmp_path / "root", 20, keep=1)
    generation = latest_generation(tmp_path / "root")
    assert generation is not None and generation.step == 20
    assert (tmp_path / "root" / "step-00000060").exists()


def test_lineage(tmp_path: Path) -> None:
    first, second = (read_manifest(save(tmp_path, step)) for step in (1, 2))
    assert first[0].parent is None and first[0].serial == 0
    assert second[0].run == first[0].run
    assert second[0].parent is not None and second[0].parent.manifest_sha256 == first[1]


def test_nothing_there(tmp_path: Path) -> None:
    assert latest_generation(tmp_path / "none") is None
    (tmp_path / "step-00000010.tmp-0123456789abcdef").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    assert latest_generation(tmp_path) is None
    save(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "notes.txt", "step-00000001"]
    for missing in (tmp_path / "step-00000099", tmp_path / "elsewhere"):
        with pytest.raises(CheckpointError, match="no such"):
            verify_generation(missing)


def test_a_copy_under_another_name_can_be_verified_and_loaded(tmp_path: Path) -> None:
    save(tmp_path, 1).rename(tmp_path / "best")
    assert verify_generation(tmp_path / "best") == []
    assert torch.equal(load_generation(tmp_path / "best").tensors("model")["w"], torch.ones(3, 5))


def test_missing_parts_are_named(tmp_path: Path) -> None:
    save(tmp_path, 1)
    generation = load_generation(tmp_path / "step-00000001")
    for ask in (generation.tensors, generation.document):
        with pytest.raises(CheckpointError, match="holds no rng"):
            ask("rng")
