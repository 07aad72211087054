"""Boxes out of generations whatever division wrote them: exact, no more bytes read than needed, gaps found by name."""

from __future__ import annotations

import hashlib
import json
import math
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skymoe.base.errors import CheckpointError
from skymoe.weights import boxes
from skymoe.weights.buffers import bytes_of
from skymoe.weights.generation import Generation, load_generation, save_generation
from skymoe.weights.hashed import pieces_to_save
from skymoe.weights.listing import find_generation
from skymoe.weights.manifest import read_manifest
from skymoe.weights.pieces import SavedPiece, by_file, whole_pieces
from skymoe.weights.sliced import SlicedGeneration
from skymoe.weights.slices import Box, flat_boxes
from skymoe.weights.staged import open_staging, publish_staged
from skymoe.weights.stored import whole_box
from skymoe.weights.verify import verify_generation, verify_listed

Pieces = list[list[SavedPiece]]


def save_pieces(root: Path, step: int, ranks: Pieces, *, run: str = "") -> Path:
    """What many ranks do together, one after the other."""
    staging = open_staging(root, step, 0)
    records = {}
    for rank, pieces in enumerate(ranks):
        for name, content in by_file(pieces, rank).items():
            records[name] = pieces_to_save(content, {"step": str(step)}, alone=False).write(staging / name)
    return publish_staged(root, staging, records, step=step, layout={}, torch="0", keep=3, run=run)


def cut(stem: str, name: str, tensor: torch.Tensor, divisions: list[list[int]]) -> list[SavedPiece]:
    """A tensor in a grid of boxes; `divisions` are the inner borders of each dimension."""
    shape = tuple(tensor.shape)
    edges = [[0, *inner, size] for inner, size in zip(divisions, shape, strict=True)]
    ranges = [list(zip(edge, edge[1:], strict=False)) for edge in edges]
    found = []
    for box in product(*ranges):
        found.append(SavedPiece(stem, name, shape, box, tensor[tuple(slice(*part) for part in box)]))
    return found


def part(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    return tensor[tuple(slice(*one) for one in box)]


def grid(tmp_path: Path) -> tuple[torch.Tensor, Generation]:
    whole = torch.arange(7 * 10 * 5, dtype=torch.float32).reshape(7, 10, 5)
    pieces = cut("model", "w", whole, [[2, 3], [4], [1, 3]])
    path = save_pieces(tmp_path, 1, [pieces[0::3], pieces[1::3], pieces[2::3]])
    return whole, load_generation(path)


def test_any_box_of_any_division(tmp_path: Path) -> None:
    whole, generation = grid(tmp_path)
    sliced = SlicedGeneration(generation)
    assert sorted(generation.manifest.files) == [f"model-0000{rank}.safetensors" for rank in range(3)]
    assert "w#2" in generation.manifest.files["model-00000.safetensors"].tensors
    ranges = [[(a, b) for a in range(size + 1) for b in range(a, size + 1)] for size in whole.shape]
    boxes_ = list(product(*ranges))
    for box in boxes_[:: len(boxes_) // 700]:
        found = sliced.read("model", "w", box)
        assert found is not None and torch.equal(found, part(whole, box)), box
    assert torch.equal(generation.tensors("model")["w"], whole)
    assert sliced.read("model", "x", ((0, 1),)) is None and sliced.read("optimizer", "w", ()) is None
    assert sliced.names("model")["w"].shape == (7, 10, 5) and not sliced.names("rng")


@pytest.mark.parametrize(("long", "chunk"), [(1, 24), (16, 60), (10**6, 200)])
def test_blocks_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long: int, chunk: int) -> None:
    """Every way of reading (long runs, blocks of rows, one row after the other) gives the same."""
    monkeypatch.setattr(boxes, "LONG_RUN", long)
    monkeypatch.setattr(boxes, "CHUNK_BYTES", chunk)
    whole, generation = grid(tmp_path)
    sliced = SlicedGeneration(generation)
    for box in (whole_box((7, 10, 5)), ((1, 7), (3, 9), (0, 5)), ((0, 7), (0, 10), (2, 4)), ((4, 5), (2, 8), (1, 2))):
        found = sliced.read("model", "w", box)
        assert found is not None and torch.equal(found, part(whole, box))
    flat = b"".join(bytes(one) for one in generation.stored["model"]["w"].chunks(size=52))
    assert flat == bytes(bytes_of(whole))
    assert generation.stored["model"]["w"].sha256() == hashlib.sha256(flat).hexdigest()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 6), max_size=4), st.integers(1, 5), st.data())
def test_flat_shards(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], ranks: int, data: st.DataObject
) -> None:
    """The division of an optimizer: equal runs of elements, each a few boxes; every dtype, scalars too."""
    root = tmp_path_factory.mktemp("flat")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.float64]))
    shape, count = tuple(sizes), math.prod(sizes)
    whole = torch.arange(count).to(dtype).reshape(shape)
    borders = sorted(data.draw(st.lists(st.integers(0, count), min_size=ranks - 1, max_size=ranks - 1)))
    edges = [0, *borders, count]
    pieces = [
        [
            SavedPiece("optimizer", "w/exp_avg", tuple(shape), box, part(whole, box))
            for box in flat_boxes(tuple(shape), a, b)
        ]
        for a, b in zip(edges, edges[1:], strict=False)
    ]
    generation = load_generation(save_pieces(root, 5, pieces))
    assert torch.equal(generation.tensors("optimizer")["w/exp_avg"], whole)
    box = tuple(tuple(sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))) for n in shape)
    found = SlicedGeneration(generation).read("optimizer", "w/exp_avg", box)
    assert found is not None and found.dtype == dtype and torch.equal(found, part(whole, box))


def test_a_single_process_writes_what_it_always_wrote(tmp_path: Path) -> None:
    """Version 1, no new key; and its tensors are read by box."""
    whole = torch.randn(9, 4)
    tensors = {"model": {"w": whole}, "optimizer": {"w/step": torch.tensor(3.0)}}
    path = save_generation(tmp_path, 1, tensors=tensors, documents={}, layout={})
    record = json.loads((path / "MANIFEST.json").read_text())
    assert record["version"] == 1
    assert set(record["files"]["model.safetensors"]["tensors"]["w"]) == {"dtype", "shape", "slice", "offset", "sha256"}
    sliced = SlicedGeneration(load_generation(path))
    rows, step = sliced.read("model", "w", ((2, 5), (1, 4))), sliced.read("optimizer", "w/step", ())
    assert rows is not None and torch.equal(rows, whole[2:5, 1:4])
    assert step is not None and step.shape == () and step == 3.0
    pieces = list(whole_pieces(tensors))
    for name, content in by_file(pieces, None).items():
        pieces_to_save(content, {"format": "pt", "step": "1"}, alone=True).write(tmp_path / name)
        assert (tmp_path / name).read_bytes() == (path / name).read_bytes()


def test_slices_are_version_2(tmp_path: Path) -> None:
    manifest, _ = read_manifest(grid(tmp_path)[1].path)
    assert manifest.version == 2
    assert manifest.num_tensors == 1


def test_only_the_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.randn(1000, 64)
    path = save_pieces(
        tmp_path, 1, [cut("model", "w", whole[:600], [[]] * 2)[:0], cut("model", "w", whole, [[600], []])]
    )
    read = []
    real = boxes.Source.fill

    def fill(self: boxes.Source, start: int, out: boxes.Words) -> None:
        read.append(out.nbytes)
        real(self, start, out)

    monkeypatch.setattr(boxes.Source, "fill", fill)
    found = SlicedGeneration(load_generation(path)).read("model", "w", ((590, 610), (0, 64)))
    assert found is not None and torch.equal(found, whole[590:610])
    assert read == [10 * 64 * 4, 10 * 64 * 4]


def test_a_gap_is_named(tmp_path: Path) -> None:
    whole = torch.randn(8, 6)
    pieces = cut("model", "w", whole, [[3, 5], []])
    path = save_pieces(tmp_path, 1, [pieces[:1], pieces[2:]])
    assert [(one.tensor, one.what) for one in verify_generation(path)] == [("w", "12 of 48 elements are in no file")]
    with pytest.raises(CheckpointError, match="12 of 48 elements are in no file"):
        load_generation(path)
    manifest, _ = read_manifest(path)
    sliced = SlicedGeneration(Generation(path, 1, manifest))
    found = sliced.read("model", "w", ((0, 3), (0, 6)))
    assert found is not None and torch.equal(found, whole[:3])
    with pytest.raises(CheckpointError, match=r"tensor w: 6 elements of \[2:4, 0:6\] are in no file"):
        sliced.read("model", "w", ((2, 4), (0, 6)))
    with pytest.raises(CheckpointError, match="it has no"):
        sliced.read("model", "w", ((0, 9), (0, 6)))
    with pytest.raises(CheckpointError, match="it has no"):
        sliced.read("model", "w", ((0, 8),))


def test_an_overlap_is_named(tmp_path: Path) -> None:
    whole = torch.randn(8, 6)
    first = SavedPiece("model", "w", (8, 6), ((0, 8), (0, 4)), whole[:, :4])
    second = SavedPiece("model", "w", (8, 6), ((4, 8), (3, 6)), whole[4:, 3:])
    problems = verify_generation(save_pieces(tmp_path, 1, [[first], [second]]))
    assert [(one.tensor, one.what) for one in problems] == [("w", "[4:8, 3:6] is stored twice")]


def test_pieces_of_different_tensors(tmp_path: Path) -> None:
    first = SavedPiece("model", "w", (4,), ((0, 2),), torch.ones(2))
    second = SavedPiece("model", "w", (5,), ((2, 4),), torch.ones(2))
    problems = verify_generation(save_pieces(tmp_path, 1, [[first], [second]]))
    assert [one.what for one in problems] == ["tensor w: its pieces are not of one tensor"]


def test_damage_after_verification_is_found_in_a_whole_piece(tmp_path: Path) -> None:
    _, generation = grid(tmp_path)
    path = generation.path / "model-00001.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="model-00001.safetensors: damaged: tensor w does not match its hash"):
        generation.tensors("model")
    problems = verify_listed(find_generation(generation.path))
    assert [one.file for one in problems] == ["model-00001.safetensors"]
