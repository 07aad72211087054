"""Generations that many real ranks write and read: any layout into any other, failures alike on all ranks."""

from __future__ import annotations

import errno
import itertools
import os
import random
import signal
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from parallel.checkpoints import LAYOUTS, SPEC, part, pieces_of, state_of
from parallel.ranks import run_ranks

from skymoe.base.errors import CheckpointError, MachineError, SkymoeError
from skymoe.parallel.async_save import AsyncSaver
from skymoe.parallel.checkpoint import latest_generation_distributed, save_generation_distributed
from skymoe.parallel.mesh import Mesh, build_mesh, single_mesh
from skymoe.parallel.texts import broadcast_bytes, gather_bytes
from skymoe.parallel.together import together
from skymoe.weights import hashing
from skymoe.weights.division import divide, layout_document
from skymoe.weights.generation import latest_generation, save_generation, verify_generation
from skymoe.weights.manifest import generation_name
from skymoe.weights.pieces import SavedPiece
from skymoe.weights.sliced import SlicedGeneration
from skymoe.weights.slices import owned_slices

CPU = torch.device("cpu")


def save(root: Path, step: int, mesh: Mesh, keep: int = 3) -> Path:
    pieces = pieces_of(state_of(step), mesh.layout, mesh.rank)
    documents = {"state": {"step": step, "model": asdict(SPEC)}} if mesh.rank == 0 else {}
    return save_generation_distributed(root, step, pieces, documents, mesh, layout_document(mesh.layout), keep=keep)


def save_whole(root: Path, step: int) -> Path:
    """As one process does today."""
    documents = {"state": {"step": step, "model": asdict(SPEC)}}
    return save_generation(root, step, tensors=state_of(step), documents=documents, layout={"world_size": 1})


def assert_is_state(root: Path, step: int) -> None:
    generation = latest_generation(root)
    assert generation is not None and generation.step == step
    for stem, expected in state_of(step).items():
        loaded = generation.tensors(stem)
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
        assert all(loaded[name].dtype == tensor.dtype for name, tensor in expected.items())
    assert generation.document("state")["step"] == step


def check_owned(root: Path, step: int, mesh: Mesh) -> int:
    """Read every tensor that this rank owns, from whatever is there; how many."""
    generation = latest_generation_distributed(root, mesh)
    assert generation is not None and generation.step == step and not generation.skipped
    sliced, state, count = SlicedGeneration(generation), state_of(step), 0
    for stage in mesh.layout.stages_of(mesh.coordinate.pp):
        for name, owned in owned_slices(SPEC, mesh.layout, mesh.coordinate, stage).items():
            for piece in owned.pieces:
                for stem, tensor in (("model", name), ("optimizer", f"{name}/exp_avg")):
                    found = sliced.read(stem, tensor, piece.whole)
                    if found is None:
                        assert name.endswith("expert_bias") and stem == "optimizer"
                    else:
                        assert torch.equal(found, part(state[stem][tensor], piece.whole)), tensor
                        count += 1
            steps = sliced.read("optimizer", f"{name}/step", ())
            assert steps is None or steps == step
    assert sliced.read("optimizer", "nobody/exp_avg", ((0, 1),)) is None
    return count


def every_piece_once(name: str) -> None:
    covered = {key: torch.zeros(tensor.shape, dtype=torch.int64) for key, tensor in state_of(0)["model"].items()}
    for key, shares in divide(SPEC, LAYOUTS[name]).items():
        for _, box in shares:
            part(covered[key], box).add_(1)
    assert all(bool((count == 1).all()) for count in covered.values())


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_division_covers_everything_once(name: str) -> None:
    every_piece_once(name)
    assert any(len({rank for rank, _ in shares}) > 1 for shares in divide(SPEC, LAYOUTS[name]).values()) or name in (
        "1", "PP2", "PP3",
    )  # fmt: skip


def _texts() -> tuple[list[bytes], bytes, bytes]:
    mesh = build_mesh(LAYOUTS["PP3"], CPU)
    own = bytes([mesh.rank]) * (1000 * mesh.rank)
    return (
        gather_bytes(own, mesh.world, CPU),
        broadcast_bytes(b"from " + own + b"0", mesh.world, CPU),
        broadcast_bytes(b"", mesh.world, CPU),
    )


def test_texts() -> None:
    first, *others = run_ranks(3, _texts)
    assert first[0] == [b"", b"\1" * 1000, b"\2" * 2000]
    assert all(other[0] == [] for other in others)
    assert all(one[1:] == (b"from 0", b"") for one in (first, *others))


def _save(root: Path, steps: list[int], name: str) -> list[str]:
    mesh = build_mesh(LAYOUTS[name], CPU)
    return [save(root, step, mesh, keep=2).name for step in steps]


def _check_owned(root: Path, step: int, name: str) -> int:
    return check_owned(root, step, build_mesh(LAYOUTS[name], CPU))


@pytest.mark.parametrize(
    ("writer", "reader"),
    [("PP2xEDP2", "ETP2xDP2"), ("ETP2xDP2", "PP3"), ("EP4", "EDP3"), ("PP3", "EP4"), ("DP2", "1"), ("EDP3", "ETP2")],
)
def test_saved_on_one_layout_read_on_another(tmp_path: Path, writer: str, reader: str) -> None:
    size = LAYOUTS[writer].world_size
    results = run_ranks(size, _save, tmp_path, [3, 7, 8], writer)
    assert results == [[generation_name(step) for step in (3, 7, 8)]] * size
    generations = sorted(path.name for path in tmp_path.iterdir())
    assert generations == ["LATEST", "step-00000007", "step-00000008"]
    assert verify_generation(tmp_path / "step-00000008") == []
    assert_is_state(tmp_path, 8)
    counts = run_ranks(LAYOUTS[reader].world_size, _check_owned, tmp_path, 8, reader)
    assert min(counts) > 10


def test_one_process_and_many_ranks_continue_each_other(tmp_path: Path) -> None:
    save_whole(tmp_path, 4)
    assert min(run_ranks(4, _check_owned, tmp_path, 4, "PP2xEDP2")) > 10
    run_ranks(4, _save, tmp_path, [5], "EP4")
    assert_is_state(tmp_path, 5)
    save_whole(tmp_path, 6)
    assert_is_state(tmp_path, 6)
    assert len({path.name for path in tmp_path.iterdir()}) == 4


def test_a_world_of_one_writes_the_files_of_a_single_process(tmp_path: Path) -> None:
    mesh = single_mesh(LAYOUTS["1"], CPU)
    one, other = save(tmp_path / "a", 4, mesh), save_whole(tmp_path / "b", 4)
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        if name != "MANIFEST.json":
            assert (one / name).read_bytes() == (other / name).read_bytes()
    assert check_owned(tmp_path / "a", 4, mesh) > 10
    assert latest_generation_distributed(tmp_path / "none", mesh) is None
    with pytest.raises(CheckpointError, match="no checkpoint here is intact"):
        (one / "model.safetensors").unlink()
        latest_generation_distributed(tmp_path / "a", mesh)


def _outcome(error: BaseException) -> tuple[str, str]:
    return type(error).__name__, str(error)


def _fail_on_rank(root: Path, bad: int, moment: str) -> tuple[str, str]:
    """A good save, then one in which the disk of rank `bad` refuses, then a good one again."""
    mesh = build_mesh(LAYOUTS["PP2xEDP2"], CPU)
    save(root, 1, mesh)
    real = hashing.write_all
    count = 0

    def full(file: Any, data: Any) -> None:
        nonlocal count
        count += 1
        if count >= {"first": 1, "later": 5}[moment]:
            os.write(file.fileno(), bytes(memoryview(data)[:10]))
            raise OSError(errno.ENOSPC, "No space left on device", file.name)
        real(file, data)

    if mesh.rank == bad:
        hashing.write_all = full
    try:
        save(root, 2, mesh)
    except SkymoeError as error:
        outcome = _outcome(error)
    else:
        outcome = ("", "")
    hashing.write_all = real
    generation = latest_generation_distributed(root, mesh)
    assert generation is not None and generation.step == 1 and not generation.skipped
    assert sorted(os.listdir(root)) == ["LATEST", "step-00000001"]
    save(root, 3, mesh)
    return outcome


@pytest.mark.parametrize(("bad", "moment"), [(3, "first"), (2, "later"), (0, "later")])
def test_a_full_disk_of_one_rank_is_told_alike(tmp_path: Path, bad: int, moment: str) -> None:
    outcomes = run_ranks(4, _fail_on_rank, tmp_path, bad, moment)
    assert len(set(outcomes)) == 1
    kind, text = outcomes[0]
    assert kind == "MachineError"
    assert f"rank {bad}: the checkpoint cannot be saved: No space left on device" in text
    assert "the generations saved before are untouched" in text
    assert_is_state(tmp_path, 3)


def _no_room(root: Path) -> tuple[str, str]:
    mesh = build_mesh(LAYOUTS["EDP2"], CPU)
    save(root, 1, mesh)
    try:
        save_generation_distributed(root, 2, [_huge(mesh.rank)], {}, mesh, {})
    except MachineError as error:
        assert sorted(os.listdir(root)) == ["LATEST", "step-00000001"]
        return _outcome(error)
    raise AssertionError("a petabyte was saved")


def _huge(rank: int) -> SavedPiece:
    """No memory: an expanded view."""
    size = 2**48
    box = ((rank * size, (rank + 1) * size),)
    return SavedPiece("model", "w", (2 * size,), box, torch.zeros(1).expand(size))


def test_space_is_counted_over_all_ranks(tmp_path: Path) -> None:
    outcomes = run_ranks(2, _no_room, tmp_path)
    assert outcomes[0] == outcomes[1]
    assert "rank 0: not enough space" in outcomes[0][1] and "2251799.81 GB needed" in outcomes[0][1]


def _incomplete(root: Path, kind: str) -> tuple[str, str]:
    mesh = build_mesh(LAYOUTS["DP2"], CPU)
    pieces = list(pieces_of(state_of(1), mesh.layout, mesh.rank))
    if mesh.rank == 1:
        pieces = pieces[1:] if kind == "gap" else [*pieces, next(pieces_of(state_of(1), mesh.layout, 0))]
    try:
        save_generation_distributed(root, 1, pieces, {}, mesh, {})
    except CheckpointError as error:
        assert os.listdir(root) == []
        return _outcome(error)
    raise AssertionError("published all the same")


@pytest.mark.parametrize(("kind", "what"), [("gap", "elements are in no file"), ("overlap", "is stored twice")])
def test_what_does_not_make_up_whole_tensors_is_not_published(tmp_path: Path, kind: str, what: str) -> None:
    outcomes = run_ranks(2, _incomplete, tmp_path, kind)
    assert outcomes[0] == outcomes[1]
    assert "embed.weight" in outcomes[0][1] and what in outcomes[0][1]


def _defect(root: Path) -> str:
    mesh = build_mesh(LAYOUTS["EDP2"], CPU)

    def action() -> int:
        if mesh.rank == 1:
            raise KeyError("x")
        return 5

    assert together(mesh, lambda: mesh.rank) == mesh.rank
    try:
        together(mesh, action)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_defect_keeps_its_own_error(tmp_path: Path) -> None:
    assert run_ranks(2, _defect, tmp_path) == ["RuntimeError: rank 1: KeyError: 'x'", "KeyError: 'x'"]


def _latest(root: Path, name: str) -> tuple[int, tuple[tuple[str, str], ...]]:
    generation = latest_generation_distributed(root, build_mesh(LAYOUTS[name], CPU))
    assert generation is not None
    return generation.step, generation.skipped


@pytest.mark.parametrize("byte", [-1, 12])
def test_a_flipped_bit_makes_all_ranks_fall_back(tmp_path: Path, byte: int) -> None:
    run_ranks(4, _save, tmp_path, [1, 2], "PP2xEDP2")
    path = tmp_path / "step-00000002" / "optimizer-00002.safetensors"
    raw = bytearray(path.read_bytes())
    raw[byte] ^= 4
    path.write_bytes(raw)
    results = run_ranks(3, _latest, tmp_path, "PP3")
    assert results == [results[0]] * 3
    step, (skipped,) = results[0]
    assert step == 1 and skipped[0] == "step-00000002"
    what = "does not match its hash" if byte == -1 else "the header is damaged"
    assert skipped[1].startswith("optimizer-00002.safetensors: ") and what in skipped[1]
    assert ("layers." in skipped[1]) == (byte == -1)


def _die(root: Path) -> NoReturn:
    """Rank 1 is gone in the middle of a save."""
    mesh = build_mesh(LAYOUTS["EDP2"], CPU)
    save(root, 1, mesh)
    if mesh.rank == 1:
        real = hashing.write_all
        hashing.write_all = lambda file, data: (real(file, data), os._exit(9))
    save(root, 2, mesh)
    raise AssertionError("saved without rank 1")


def test_a_rank_that_dies(tmp_path: Path) -> None:
    root = tmp_path / "root"
    with pytest.raises(AssertionError, match="closed|reset|ended without an answer"):
        run_ranks(2, _die, root, timeout_s=20)
    assert_is_state(root, 1)
    run_ranks(2, _save, root, [2], "DP2")
    assert sorted(path.name for path in root.iterdir()) == ["LATEST", "step-00000001", "step-00000002"]
    assert_is_state(root, 2)


def _save_until_killed(root: Path, name: str, bad: int, after_s: float, background: bool) -> NoReturn:
    """Saves without end; rank `bad` is killed at some moment of one of them."""
    mesh = build_mesh(LAYOUTS[name], CPU)
    saver = AsyncSaver(root, mesh)
    first = next((int(path.name[5:]) for path in sorted(root.glob("step-*[0-9]"), reverse=True)), 0)
    together(mesh, lambda: None)  # everybody has looked
    if mesh.rank == bad:
        threading.Timer(after_s, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    for step in itertools.count(first + 1):
        if background:
            saver.save(step, pieces_of(state_of(step), mesh.layout, mesh.rank), {"state": {"step": step}}, {})
            saver.poll()
        else:
            save(root, step, mesh)
    raise AssertionError


def kill_and_look(root: Path, seed: int) -> int:
    rng = random.Random(seed)
    name = rng.choice(["1", "PP2", "EDP2", "DP2", "PP2xEDP2"])
    size = LAYOUTS[name].world_size
    with pytest.raises(AssertionError, match="rank"):
        run_ranks(size, _save_until_killed, root, name, rng.randrange(size), rng.uniform(0, 0.8), rng.random() < 0.5)
    generation = latest_generation(root)
    if generation is None:
        return 0
    assert not generation.skipped
    assert_is_state(root, generation.step)
    return generation.step


def test_killed_at_a_random_moment(tmp_path: Path) -> None:
    steps = [kill_and_look(tmp_path, seed) for seed in range(3)]
    assert steps == sorted(steps)


@pytest.mark.slow
def test_killed_at_many_random_moments(tmp_path: Path) -> None:
    kills = int(os.environ.get("SKYMOE_KILLS", "12"))  # 60 and more for the record
    steps = [kill_and_look(tmp_path, 100 + seed) for seed in range(kills)]
    assert steps == sorted(steps) and steps[-1] >= 1


def _async(root: Path, name: str) -> list[str | None]:
    mesh = build_mesh(LAYOUTS[name], CPU)
    results: list[str | None] = []

    def told(path: Path | None) -> None:
        results.append(path.name if path else None)

    with AsyncSaver(root, mesh, keep=9) as saver:
        told(saver.poll())
        for step in (1, 2):
            pieces = [
                piece._replace(tensor=piece.tensor.clone())
                for piece in pieces_of(state_of(step), mesh.layout, mesh.rank)
            ]
            told(saver.save(step, pieces, {"state": {"step": step}}, {}))
            for piece in pieces:
                piece.tensor.zero_()  # the next training step
        told(saver.flush())
        told(saver.poll())
        told(saver.save(3, pieces_of(state_of(3), mesh.layout, mesh.rank), {"state": {"step": 3}}, {}))
        while (path := saver.poll()) is None:
            pass
        told(path)
        told(saver.close())
    for step in (1, 2, 3):
        pieces_ = pieces_of(state_of(step), mesh.layout, mesh.rank)
        save_generation_distributed(root / "sync", step, pieces_, {"state": {"step": step}}, mesh, {}, keep=9)
    return results


@pytest.mark.parametrize("name", ["1", "ETP2"])
def test_async_is_sync_byte_for_byte(tmp_path: Path, name: str) -> None:
    results = run_ranks(LAYOUTS[name].world_size, _async, tmp_path, name)
    names = [generation_name(step) for step in (1, 2, 3)]
    assert results == [[None, None, names[0], names[1], None, None, names[2], None]] * len(results)
    for generation in names:
        assert verify_generation(tmp_path / generation) == []
        for path in (tmp_path / "sync" / generation).iterdir():
            if path.name != "MANIFEST.json":
                assert path.read_bytes() == (tmp_path / generation / path.name).read_bytes(), path
    assert_is_state(tmp_path, 3)


def _async_fails(root: Path) -> list[tuple[str, str]]:
    mesh = build_mesh(LAYOUTS["EDP2"], CPU)
    real, outcomes = hashing.write_all, []

    def full(file: Any, data: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", file.name)

    saver = AsyncSaver(root, mesh)
    for finish in ("poll", "save", "close"):
        hashing.write_all = full if mesh.rank == 1 else real
        saver.save(1, pieces_of(state_of(1), mesh.layout, mesh.rank), {}, {})
        try:
            if finish == "save":
                saver.save(2, [], {}, {})
            while finish == "poll":
                assert saver.poll() is None
            saver.close()
        except MachineError as error:
            outcomes.append(_outcome(error))
        assert os.listdir(root) == []
    hashing.write_all = real
    assert saver.close() is None
    return outcomes


def test_async_errors_rise_at_the_next_call_on_all_ranks(tmp_path: Path) -> None:
    outcomes = run_ranks(2, _async_fails, tmp_path)
    assert outcomes[0] == outcomes[1] and len(outcomes[0]) == 3
    assert all("rank 1: the checkpoint cannot be saved: No space left" in text for _, text in outcomes[0])
