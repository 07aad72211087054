from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from skymoe.base.dtype import DType
from skymoe.base.errors import FormatError
from skymoe.ops.fp8 import decode_table, quantize
from skymoe.spec.quantization import STYLE_OF, Fp8Scheme, QuantizationSpec, write_quantization
from skymoe.weights.buffers import info_of
from skymoe.weights.decoded import DecodedReader
from skymoe.weights.header import TensorInfo
from skymoe.weights.reader import WeightsReader
from skymoe.weights.writer import ShardedWriter

BLOCK = {"quant_method": "fp8", "weight_block_size": [128, 128]}
TENSOR = {"quant_method": "fp8"}
CHANNEL = write_quantization(QuantizationSpec(scheme=Fp8Scheme.CHANNEL, style=STYLE_OF[Fp8Scheme.CHANNEL]))
SCALE_NAMES = {Fp8Scheme.BLOCK: "weight_scale_inv", Fp8Scheme.CHANNEL: "weight_scale", Fp8Scheme.TENSOR: "weight_scale"}
CONFIGS = {Fp8Scheme.BLOCK: BLOCK, Fp8Scheme.CHANNEL: CHANNEL, Fp8Scheme.TENSOR: TENSOR}


def write(path: Path, tensors: dict[str, Tensor], quantization: dict[str, Any] | None) -> Path:
    path.mkdir()
    plan = [(name, info_of(name, tensor).dtype, tensor.shape) for name, tensor in tensors.items()]
    with ShardedWriter(path, plan, max_shard_bytes=20_000) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    (path / "config.json").write_text(json.dumps({"quantization_config": quantization} if quantization else {}))
    return path


def example(scheme: Fp8Scheme, shape: tuple[int, int] = (200, 150)) -> tuple[dict[str, Tensor], Tensor]:
    """A directory's tensors, and the fp32 value of `x.weight`."""
    torch.manual_seed(11)
    codes, scale = quantize(torch.randn(shape), scheme)
    wide = scale
    if scheme is Fp8Scheme.BLOCK:
        wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
    value = decode_table()[codes.view(torch.uint8).long()] * wide
    return {"x.weight": codes, f"x.{SCALE_NAMES[scheme]}": scale, "norm.weight": torch.randn(5).half()}, value


@pytest.mark.parametrize("scheme", list(Fp8Scheme))
@pytest.mark.parametrize("decode_to", [DType.BFLOAT16, DType.FLOAT32])
def test_fp8_reads_as_a_plain_tensor(tmp_path: Path, scheme: Fp8Scheme, decode_to: DType) -> None:
    tensors, value = example(scheme)
    with DecodedReader(write(tmp_path / "m", tensors, CONFIGS[scheme]), decode_to=decode_to) as reader:
        assert reader.names() == {
            "x.weight": TensorInfo(decode_to, (200, 150)),
            "norm.weight": TensorInfo(DType.FLOAT16, (5,)),
        }
        expected = value.to(torch.float32 if decode_to is DType.FLOAT32 else torch.bfloat16)
        assert torch.equal(reader.tensor("x.weight"), expected)
        assert torch.equal(reader.slice("x.weight"), expected)
        assert torch.equal(reader.slice("x.weight", range(127, 140)), expected[127:140])
        assert torch.equal(reader.slice("x.weight", range(3, 190), range(100, 131)), expected[3:190, 100:131])
        assert reader.slice("x.weight", range(7, 7)).shape == (0, 150)
        assert torch.equal(reader.tensor("norm.weight"), tensors["norm.weight"])
        for hidden in (f"x.{SCALE_NAMES[scheme]}", "y.weight"):
            with pytest.raises(FormatError, match="there is no tensor"):
                reader.tensor(hidden)
            with pytest.raises(FormatError, match="there is no tensor"):
                reader.slice(hidden, range(1))


@pytest.mark.parametrize(
    ("scheme", "shape"),
    [(Fp8Scheme.CHANNEL, (200,)), (Fp8Scheme.TENSOR, (1,)), (Fp8Scheme.TENSOR, (1, 1))],
)
def test_scales_of_other_shapes_and_types(tmp_path: Path, scheme: Fp8Scheme, shape: tuple[int, ...]) -> None:
    tensors, _ = example(scheme)
    tensors["x.weight_scale"] = tensors["x.weight_scale"].bfloat16().reshape(shape)
    codes = decode_table()[tensors["x.weight"].view(torch.uint8).long()]
    scale = tensors["x.weight_scale"].float()
    with DecodedReader(write(tmp_path / "m", tensors, CONFIGS[scheme]), decode_to=DType.FLOAT32) as reader:
        assert torch.equal(
            reader.tensor("x.weight"), codes * (scale.view(-1, 1) if scheme is Fp8Scheme.CHANNEL else scale)
        )


def test_transformers_form_of_one_scale_per_matrix(tmp_path: Path) -> None:
    tensors, value = example(Fp8Scheme.TENSOR)
    tensors = {name.replace("_scale", "_scale_inv"): tensor for name, tensor in tensors.items()}
    config = BLOCK | {"weight_block_size": None, "activation_scheme": "static"}
    tensors["x.activation_scale"] = torch.tensor(0.5)
    with DecodedReader(write(tmp_path / "m", tensors, config), decode_to=DType.FLOAT32) as reader:
        assert list(reader.names()) == ["x.weight", "norm.weight"]
        assert torch.equal(reader.tensor("x.weight"), value)


@pytest.mark.parametrize("scheme", list(Fp8Scheme))
def test_without_a_config_the_shape_of_the_scale_decides(tmp_path: Path, scheme: Fp8Scheme) -> None:
    """June 2024: vLLM was told on its command line that a model is FP8."""
    tensors, value = example(scheme)
    with DecodedReader(write(tmp_path / "m", tensors, None), decode_to=DType.FLOAT32) as reader:
        assert torch.equal(reader.tensor("x.weight"), value)


def test_scales_of_activations_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors, value = example(Fp8Scheme.TENSOR)
    tensors |= {f"x.{name}": torch.tensor(0.5) for name in ("act_scale", "input_scale", "activation_scale")}
    with caplog.at_level(logging.INFO, "skymoe"):
        reader = DecodedReader(write(tmp_path / "m", tensors, TENSOR | {"activation_scheme": "static"}))
    with reader:
        assert list(reader.names()) == ["x.weight", "norm.weight"]
        assert torch.equal(reader.tensor("x.weight"), value.bfloat16())
    told = [record.message for record in caplog.records if "activations" in record.message]
    assert len(told) == 1 and "3 scales of activations" in told[0]


def test_a_plain_directory_is_read_as_ever(tmp_path: Path) -> None:
    tensors = {"x.weight": torch.randn(9, 7), "i": torch.arange(4)}
    path = write(tmp_path / "m", tensors, None)
    for config in ("{}", None):
        if config is None:
            (path / "config.json").unlink()
        with DecodedReader(path) as decoded, WeightsReader(path) as plain:
            assert decoded.names() == plain.names() and not decoded.scaled
            for name, tensor in tensors.items():
                assert torch.equal(decoded.tensor(name), tensor)
            assert torch.equal(decoded.slice("x.weight", range(2, 5), range(1, 3)), tensors["x.weight"][2:5, 1:3])


def changed(scheme: Fp8Scheme, **changes: Tensor | None) -> dict[str, Tensor]:
    tensors, _ = example(scheme)
    merged = tensors | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in merged.items() if tensor is not None}


CODES = example(Fp8Scheme.BLOCK)[0]["x.weight"]
HEADER_FAULTS = [
    (changed(Fp8Scheme.BLOCK, x__weight_scale_inv=None), BLOCK, "x.weight is FP8 and has no scale"),
    (changed(Fp8Scheme.BLOCK, x__weight_scale=torch.tensor(1.0)), BLOCK, "x.weight is FP8 and has two scales"),
    (changed(Fp8Scheme.BLOCK, y__weight_scale_inv=torch.ones(1, 1)), BLOCK, "y.weight_scale_inv is the scale of"),
    (changed(Fp8Scheme.BLOCK, norm__weight_scale=torch.ones(5)), BLOCK, "norm.weight is float16"),
    (changed(Fp8Scheme.BLOCK, x__weight_scale_inv=torch.ones(2, 3)), BLOCK, "is [2, 3], expected [2, 2]"),
    (changed(Fp8Scheme.BLOCK, x__weight_scale_inv=torch.ones(2, 2).int()), BLOCK, "x.weight_scale_inv is int32"),
    (changed(Fp8Scheme.BLOCK), TENSOR, "x.weight_scale_inv is [2, 2], expected []"),
    (changed(Fp8Scheme.CHANNEL), BLOCK, "x.weight_scale is [200, 1], expected [2, 2]"),
    (changed(Fp8Scheme.TENSOR), CHANNEL, "x.weight_scale is [], expected [200, 1]"),
    (changed(Fp8Scheme.BLOCK, x__weight_scale_inv=torch.ones(7, 5)), None, "fits no scheme"),
    (changed(Fp8Scheme.BLOCK), BLOCK | {"modules_to_not_convert": ["x"]}, "config.json says that this module is not"),
    ({"x.weight": torch.ones(3, 3)}, BLOCK, "but no tensor is"),
    (changed(Fp8Scheme.BLOCK, x__weight=CODES.float().to(torch.float8_e5m2)), BLOCK, "x.weight is float8_e5m2"),
    (changed(Fp8Scheme.BLOCK, v__weight=CODES[0], v__weight_scale_inv=torch.ones(1)), BLOCK, "v.weight [150] is FP8"),
    (changed(Fp8Scheme.BLOCK, fused=CODES[None], fused_scale_inv=torch.ones(1, 2, 2)), BLOCK, "fused [1, 200, 150] is"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "config", "told"), HEADER_FAULTS, ids=[fault[2] for fault in HEADER_FAULTS])
def test_what_does_not_fit_is_named(
    tmp_path: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None, told: str
) -> None:
    path = write(tmp_path / "m", tensors, config)
    with pytest.raises(FormatError) as error:
        DecodedReader(path)
    assert told in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf"), 1e37])
@pytest.mark.parametrize("scheme", list(Fp8Scheme))
def test_damaged_scales_are_refused(tmp_path: Path, bad: float, scheme: Fp8Scheme) -> None:
    tensors, _ = example(scheme)
    tensors[f"x.{SCALE_NAMES[scheme]}"].view(-1)[-1] = bad
    with DecodedReader(write(tmp_path / "m", tensors, CONFIGS[scheme])) as reader:
        for read in (reader.tensor, lambda name: reader.slice(name, range(3))):
            with pytest.raises(FormatError, match=rf"x\.{SCALE_NAMES[scheme]} holds the scale"):
                read("x.weight")


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_codes_that_are_no_number_are_refused(tmp_path: Path, code: int) -> None:
    tensors, _ = example(Fp8Scheme.BLOCK)
    tensors["x.weight"].view(torch.uint8)[199, 149] = code
    with DecodedReader(write(tmp_path / "m", tensors, BLOCK)) as reader:
        assert reader.slice("x.weight", range(199)).isfinite().all()
        with pytest.raises(FormatError, match=r"x\.weight holds a code that is not a number"):
            reader.tensor("x.weight")
