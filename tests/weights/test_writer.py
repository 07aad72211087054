"""ShardedWriter: any order of arrival gives the same bytes, others read them, nothing is missing silently."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from skymoe.base.dtype import DType
from skymoe.base.errors import ConfigError, FormatError, MachineError
from skymoe.weights.buffers import info_of
from skymoe.weights.reader import WeightsReader
from skymoe.weights.writer import ShardedWriter

TENSORS = {
    "embed": torch.arange(35, dtype=torch.float32).reshape(7, 5),
    "flag": torch.tensor([True, False, True]),
    "w": torch.randn(3, 11, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "none": torch.zeros(0, 4),
    "head": torch.ones(9, dtype=torch.float8_e4m3fn),
}
PLAN = [(name, info_of(name, t).dtype, tuple(t.shape)) for name, t in TENSORS.items()]


def write(directory: Path, order: list[str], max_shard_bytes: int = 10**9) -> tuple[Path, ...]:
    directory.mkdir()
    writer = ShardedWriter(directory, PLAN, max_shard_bytes=max_shard_bytes)
    for name in order:
        writer.add(name, TENSORS[name])
    return writer.finish()


def test_one_shard_is_one_file_that_the_reference_library_reads(tmp_path: Path) -> None:
    files = write(tmp_path / "m", list(TENSORS))
    assert [path.name for path in files] == ["model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["model.safetensors"]
    loaded = load_file(files[0])
    assert loaded.keys() == TENSORS.keys()
    assert all(
        torch.equal(loaded[n].view(torch.uint8), TENSORS[n].view(torch.uint8)) for n in loaded if loaded[n].dim()
    )


def test_bytes_do_not_depend_on_the_order_of_arrival(tmp_path: Path) -> None:
    first = [path.read_bytes() for path in write(tmp_path / "0", list(TENSORS), 64)]
    for seed in range(1, 5):
        order = random.Random(seed).sample(list(TENSORS), len(TENSORS))
        assert [path.read_bytes() for path in write(tmp_path / str(seed), order, 64)] == first


def test_shards_and_index(tmp_path: Path) -> None:
    files = write(tmp_path / "m", list(TENSORS), 64)
    assert [path.name for path in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert len(files) > 2
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    assert index["weight_map"].keys() == TENSORS.keys()
    for path in files:
        assert sum(t.nbytes for t in load_file(path).values()) <= 64 or len(load_file(path)) == 1
    with WeightsReader(tmp_path / "m") as reader:
        for name, tensor in TENSORS.items():
            assert torch.equal(reader.tensor(name).float(), tensor.float())


def test_memory_that_is_not_contiguous(tmp_path: Path) -> None:
    tensor = torch.arange(24.0).reshape(4, 6).t()[1:5]
    with ShardedWriter(tmp_path, [("w", DType.FLOAT32, tensor.shape)]) as writer:
        writer.add("w", tensor.requires_grad_())
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], tensor)


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    writer = ShardedWriter(tmp_path, PLAN)
    writer.add("embed", TENSORS["embed"])
    with pytest.raises(FormatError, match="5 planned tensors were never written: scalar, none, w, flag, head"):
        writer.finish()


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("other", torch.ones(1), "not in the plan"),
        ("embed", torch.ones(5, 7), r"planned float32 \[7, 5\], got float32 \[5, 7\]"),
        ("embed", torch.ones(7, 5).half(), "got float16"),
        ("embed", torch.ones(7, 5, dtype=torch.complex64), "complex64 cannot be stored"),
    ],
)
def test_what_was_not_planned_is_refused(name: str, tensor: torch.Tensor, message: str, tmp_path: Path) -> None:
    writer = ShardedWriter(tmp_path, PLAN)
    with pytest.raises(FormatError, match=message):
        writer.add(name, tensor)
    writer.abort()


def test_twice_is_refused(tmp_path: Path) -> None:
    writer = ShardedWriter(tmp_path, PLAN)
    writer.add("embed", TENSORS["embed"])
    with pytest.raises(FormatError, match="before"):
        writer.add("embed", TENSORS["embed"])
    with pytest.raises(FormatError, match="twice"):
        ShardedWriter(tmp_path, [*PLAN, PLAN[0]])
    with pytest.raises(FormatError, match="without tensors"):
        ShardedWriter(tmp_path, [])
    with pytest.raises(FormatError, match="cannot be called"):
        ShardedWriter(tmp_path, [("a b", DType.INT8, (1,))])


def test_an_error_inside_the_block_is_the_one_that_rises(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="mine"), ShardedWriter(tmp_path, PLAN) as writer:
        writer.add("embed", TENSORS["embed"])
        raise KeyError("mine")


def test_a_disk_that_is_too_small_is_told_before_the_first_byte(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="not enough space"):
        ShardedWriter(tmp_path, [("w", DType.FLOAT32, (2**20, 2**22))])
    assert not list(tmp_path.iterdir())


def test_transformers_loads_the_shards(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=29, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=3, head_dim=4,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    state = model.state_dict()
    plan = [(name, info_of(name, tensor).dtype, tuple(tensor.shape)) for name, tensor in state.items()]
    with ShardedWriter(tmp_path, plan, max_shard_bytes=3000) as writer:
        for name in reversed(state):
            writer.add(name, state[name])
    config.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in state.items())


def test_an_existing_shard_is_refused_unless_the_writer_resumes(tmp_path: Path) -> None:
    first = [path.read_bytes() for path in write(tmp_path / "m", list(TENSORS), 64)]
    with pytest.raises(ConfigError, match="cannot be used"):
        ShardedWriter(tmp_path / "m", PLAN, max_shard_bytes=64)
    with ShardedWriter(tmp_path / "m", PLAN, max_shard_bytes=64, resume=True) as writer:
        assert writer.done == TENSORS.keys()
        with pytest.raises(FormatError, match="before"):
            writer.add("embed", TENSORS["embed"])
    assert [path.read_bytes() for path in writer.finish()] == first


def test_resuming_writes_what_is_missing_and_nothing_else(tmp_path: Path) -> None:
    paths = write(tmp_path / "m", list(TENSORS), 64)
    first = [path.read_bytes() for path in paths]
    paths[0].rename(paths[0].with_name(f"{paths[0].name}.part"))
    paths[1].write_bytes(first[1] + b"\0")
    writer = ShardedWriter(tmp_path / "m", PLAN, max_shard_bytes=64, resume=True)
    missing = [name for name in TENSORS if name not in writer.done]
    assert 0 < len(missing) < len(TENSORS)
    assert not paths[1].exists()  # what is not the shard is gone before anything is written
    for name in missing:
        writer.add(name, TENSORS[name])
    assert [path.read_bytes() for path in writer.finish()] == first
    names = sorted(path.name for path in (tmp_path / "m").iterdir())
    assert names == sorted(["model.safetensors.index.json", *(path.name for path in paths)])


def test_large_tensors_at_ragged_places(tmp_path: Path) -> None:
    """Tensors of megabytes whose sizes are no multiple of any block."""
    generator = torch.Generator().manual_seed(3)
    tensors = {f"w{i}": torch.randint(0, 256, (3, 1_000_003 * i + 7), generator=generator).byte() for i in range(1, 5)}
    plan = [(name, DType.UINT8, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with ShardedWriter(tmp_path, plan, max_shard_bytes=25_000_000) as writer:
        for name in ("w3", "w1", "w4", "w2"):
            writer.add(name, tensors[name])
    with WeightsReader(tmp_path) as reader:
        assert all(torch.equal(reader.tensor(name), tensor) for name, tensor in tensors.items())
