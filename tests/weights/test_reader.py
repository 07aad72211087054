"""WeightsReader against the reference library, and its slices against plain indexing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from skymoe.base.dtype import DType
from skymoe.base.errors import FormatError
from skymoe.spec.split import Split
from skymoe.weights.buffers import torch_dtype
from skymoe.weights.header import TensorFile, TensorInfo
from skymoe.weights.reader import WeightsReader


def sample(dtype: DType, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    if dtype is DType.BOOL:
        return torch.randint(0, 2, shape, generator=generator).bool()
    if dtype in (DType.INT8, DType.UINT8, DType.INT16, DType.INT32, DType.INT64):
        return torch.randint(0, 100, shape, generator=generator).to(torch_dtype(dtype))
    return torch.randn(shape, generator=generator).to(torch_dtype(dtype))


@pytest.fixture
def tensors(tmp_path: Path) -> dict[str, torch.Tensor]:
    tensors = {f"w.{dtype}": sample(dtype, 7, 5, 3) for dtype in DType}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "wide": sample(DType.BFLOAT16, 3, 1, 9)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tensors


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
    )


def test_every_dtype_is_read_exactly(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    with WeightsReader(tmp_path) as reader:
        assert reader.names().keys() == tensors.keys()
        assert reader.names()["wide"] == TensorInfo(DType.BFLOAT16, (3, 1, 9))
        for name, expected in tensors.items():
            assert same(reader.tensor(name), expected), name


def test_a_tensor_is_its_own_memory(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    with WeightsReader(tmp_path) as reader:
        reader.tensor("wide").zero_()
        assert same(reader.tensor("wide"), tensors["wide"])


@pytest.mark.parametrize("chunk", [1, 40, 2**23])
def test_slices_equal_indexing(
    tensors: dict[str, torch.Tensor], tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skymoe.weights.reader.CHUNK_BYTES", chunk)
    whole = tensors["w.float16"]
    with WeightsReader(tmp_path) as reader:
        for part in Split.remainder_first(7, 3):
            assert same(reader.slice("w.float16", part), whole[part.start : part.stop])
            for inner in Split((2, 0, 3)):
                expected = whole[part.start : part.stop, inner.start : inner.stop].contiguous()
                assert same(reader.slice("w.float16", part, inner), expected)
        assert same(reader.slice("w.float16", range(7), range(5), range(1, 2)), whole[:, :, 1:2].contiguous())
        assert same(reader.slice("w.float16"), whole)
        assert reader.slice("w.float16", range(3, 3)).shape == (0, 5, 3)


def test_one_of_a_stack_reads_no_more_than_its_rows(
    tensors: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row block of one expert of a fused tensor is one piece of the file."""
    sizes = []
    read = TensorFile.read_into

    def watched(self: TensorFile, name: str, buffer: memoryview, *, start: int = 0) -> None:
        sizes.append(len(buffer))
        read(self, name, buffer, start=start)

    whole = tensors["w.float32"]
    with WeightsReader(tmp_path) as reader:
        monkeypatch.setattr(TensorFile, "read_into", watched)
        for expert in range(7):
            part = range(expert, expert + 1)
            assert same(reader.slice("w.float32", part, range(1, 4)), whole[expert : expert + 1, 1:4].contiguous())
            assert same(reader.slice("w.float32", part, range(3, 4), range(1, 3)), whole[expert, 3, 1:3][None, None])
        assert sizes == [3 * 3 * 4, 2 * 4] * 7
        assert reader.slice("w.float32", range(2, 3), range(2, 2)).shape == (1, 0, 3)


def test_misuse_is_named(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    with WeightsReader(tmp_path) as reader:
        with pytest.raises(FormatError, match="no tensor nope"):
            reader.tensor("nope")
        for parts in ((range(8),), (range(-1, 2),), (range(0, 7, 2),), (range(7), range(5), range(3), range(1))):
            with pytest.raises(IndexError):
                reader.slice("w.float32", *parts)
