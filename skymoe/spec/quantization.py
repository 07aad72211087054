"""QuantizationSpec: how FP8 weights lie in a model directory, and the `quantization_config` that says so.

A weight W is stored as e4m3 numbers Q (one byte: sign, 4 exponent bits, 3 of mantissa, largest value 448) and fp32
scales s, with W = Q * s. The schemes differ in how many weights share a scale:

| scheme    | one scale for     | scale tensor                           | written as                           |
|-----------|-------------------|----------------------------------------|--------------------------------------|
| `block`   | 128 x 128 weights | `X.weight_scale_inv` [out/128, in/128] | transformers `fp8` (DeepSeek)        |
| `channel` | one row           | `X.weight_scale` [out, 1]              | compressed-tensors `float-quantized` |
| `tensor`  | the whole matrix  | `X.weight_scale`, a scalar             | AutoFP8, as Skywork-MoE-Base-FP8     |

Despite its name `weight_scale_inv` is multiplied with, like the others. Activations stay as they are on disk: every
format here rounds them while the model runs (`dynamic`), which is the business of the engine. Other formats (GPTQ, AWQ,
bitsandbytes, MXFP4, e5m2, packed integers) are refused by name. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from skymoe.base.errors import printable
from skymoe.spec.fields import Fields

FIELD = "quantization_config"
DEFAULT_BLOCK = (128, 128)
_MAX_BLOCK = 65536
_HINT = "give the model in bfloat16, or in FP8: transformers `fp8`, compressed-tensors `float-quantized`, AutoFP8"


class Fp8Scheme(StrEnum):
    """How many weights share a scale."""

    BLOCK = "block"
    CHANNEL = "channel"
    TENSOR = "tensor"


class QuantizationStyle(StrEnum):
    """Whose conventions a directory follows."""

    TRANSFORMERS = "transformers fp8"
    COMPRESSED_TENSORS = "compressed-tensors float-quantized"
    AUTO_FP8 = "autofp8"


STYLE_OF = {
    Fp8Scheme.BLOCK: QuantizationStyle.TRANSFORMERS,
    Fp8Scheme.CHANNEL: QuantizationStyle.COMPRESSED_TENSORS,
    Fp8Scheme.TENSOR: QuantizationStyle.AUTO_FP8,
}


@dataclass(frozen=True, kw_only=True)
class QuantizationSpec:
    """The FP8 of one model directory.

    Attributes:
        scheme: how many weights share a scale.
        style: whose config and names.
        block_size: rows and columns of a block (`block` only).
        not_converted: modules that keep their weights, by full name (`lm_head`, `model.layers.0.mlp.gate`). What other
            tools wrote may also hold patterns.
    """

    scheme: Fp8Scheme
    style: QuantizationStyle
    block_size: tuple[int, int] = DEFAULT_BLOCK
    not_converted: tuple[str, ...] = ()

    @property
    def scale_suffix(self) -> str:
        """What is added to the name of a weight for the name of its scale."""
        return "_scale_inv" if self.style is QuantizationStyle.TRANSFORMERS else "_scale"

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scale tensor of a weight [out, in], as we write it."""
        return scale_shape(self.scheme, shape, self.block_size)


def scale_shape(
    scheme: Fp8Scheme, shape: tuple[int, ...], block_size: tuple[int, int] = DEFAULT_BLOCK
) -> tuple[int, ...]:
    """Shape of the scale of a weight [out, in]: [ceil(out/128), ceil(in/128)], [out, 1] or a scalar."""
    rows, columns = shape
    match scheme:
        case Fp8Scheme.BLOCK:
            return (-(-rows // block_size[0]), -(-columns // block_size[1]))
        case Fp8Scheme.CHANNEL:
            return (rows, 1)
        case Fp8Scheme.TENSOR:
            return ()


def read_quantization(fields: Fields) -> QuantizationSpec | None:
    """What a config.json says of quantization; None when it says nothing.

    Raises:
        FormatError: quantized in a way that is not read, or a field is wrong; it is named.
    """
    section = fields.section(FIELD)
    if section is None:
        return None
    method = section.text("quant_method", "")
    match method:
        case "fp8":
            return _read_fp8(section)
        case "compressed-tensors":
            return _read_compressed(section)
    what = f"{printable(method)!r} is not read" if method else "is missing"
    raise section.error("quant_method", what, why="only FP8 weights with scales are", hint=_HINT)


def write_quantization(spec: QuantizationSpec) -> dict[str, Any]:
    """The `quantization_config` of `spec`, in the words of its style."""
    kept = list(spec.not_converted)
    match spec.style:
        case QuantizationStyle.TRANSFORMERS:
            block = list(spec.block_size) if spec.scheme is Fp8Scheme.BLOCK else None
            head = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
            return {**head, "weight_block_size": block, "modules_to_not_convert": kept}
        case QuantizationStyle.AUTO_FP8:
            return {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": kept}
        case QuantizationStyle.COMPRESSED_TENSORS:
            return _write_compressed(spec)


# ---- transformers `fp8`, and AutoFP8, which has the same name


def _read_fp8(section: Fields) -> QuantizationSpec:
    _require(section, "fmt", section.text("fmt", "e4m3"), "e4m3")
    _require(section, "scale_fmt", section.text("scale_fmt", "float"), "float")
    _require(section, "expert_dtype", section.text("expert_dtype", "fp8"), "fp8")
    scheme = section.text("activation_scheme", "dynamic").lower()
    if scheme not in ("dynamic", "static"):
        raise section.error("activation_scheme", f"{printable(scheme)!r} is not known", hint="dynamic or static")
    kept = (*section.texts("modules_to_not_convert"), *section.texts("ignored_layers"))
    if "weight_block_size" in section:
        block = _block_size(section, "weight_block_size")
        style = QuantizationStyle.TRANSFORMERS
        return QuantizationSpec(scheme=Fp8Scheme.BLOCK, style=style, block_size=block, not_converted=kept)
    if section.has("weight_block_size"):  # null: transformers' form of one scale per matrix
        return QuantizationSpec(scheme=Fp8Scheme.TENSOR, style=QuantizationStyle.TRANSFORMERS, not_converted=kept)
    return QuantizationSpec(scheme=Fp8Scheme.TENSOR, style=QuantizationStyle.AUTO_FP8, not_converted=kept)


def _block_size(section: Fields, name: str) -> tuple[int, int]:
    size = section.integers(name)
    if len(size) != 2 or not all(0 < side <= _MAX_BLOCK for side in size):
        raise section.error(name, f"must be two positive numbers, got {printable(list(size), 80)}", hint="[128, 128]")
    return size[0], size[1]


def _require(section: Fields, name: str, value: object, wanted: object) -> None:
    if value != wanted:
        raise section.error(name, f"{printable(value, 80)!r} is not read", why=f"only {wanted} is", hint=_HINT)


# ---- compressed-tensors


def _read_compressed(section: Fields) -> QuantizationSpec:
    _require(section, "format", section.text("format", ""), "float-quantized")
    if "kv_cache_scheme" in section:
        why = "the scales of a quantized key/value cache would be lost"
        raise section.error("kv_cache_scheme", "is set, which is not read", why=why, hint="set it to null")
    groups = section.section("config_groups")
    names = list(groups.unread()) if groups else []
    if groups is None or not names:
        raise section.error("config_groups", "is missing or empty")
    found = {_read_group(groups, name) for name in names}
    if len(found) > 1:
        raise section.error("config_groups", "quantize in more than one way, which is not read", hint=_HINT)
    scheme, block = found.pop()
    style = QuantizationStyle.COMPRESSED_TENSORS
    return QuantizationSpec(scheme=scheme, style=style, block_size=block, not_converted=section.texts("ignore"))


def _read_group(groups: Fields, name: str) -> tuple[Fp8Scheme, tuple[int, int]]:
    group = groups.section(name)
    weights = group.section("weights") if group else None
    if group is None or weights is None:
        raise groups.error(name, "says nothing of weights", hint=_HINT)
    if "format" in group:
        _require(group, "format", group.text("format"), "float-quantized")
    _require(weights, "type", weights.text("type", "int"), "float")
    _require(weights, "num_bits", weights.integer("num_bits", 8), 8)
    _require(weights, "symmetric", weights.flag("symmetric", True), True)
    strategy = weights.text("strategy", "tensor")
    if strategy not in list(Fp8Scheme):
        raise weights.error("strategy", f"{printable(strategy)!r} is not read", hint="tensor, channel or block")
    scheme = Fp8Scheme(strategy)
    block = _block_size(weights, "block_structure") if scheme is Fp8Scheme.BLOCK else DEFAULT_BLOCK
    return scheme, block


def _write_compressed(spec: QuantizationSpec) -> dict[str, Any]:
    """FP8_DYNAMIC of llm-compressor: rows of weights with a scale each, tokens of activations scaled at run time."""
    common = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None, "actorder": None}
    block = {"block_structure": list(spec.block_size) if spec.scheme is Fp8Scheme.BLOCK else None}
    weights = {**common, **block, "strategy": spec.scheme.value, "dynamic": False, "observer": "minmax"}
    tokens = {**common, "block_structure": None, "strategy": "token", "dynamic": True, "observer": None}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": tokens, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(spec.not_converted),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
