"""Which tensors of a directory are FP8, and which scale belongs to which. No torch.

Every tool has its own name for the scale of `X.weight`: `X.weight_scale_inv` (DeepSeek, transformers) and
`X.weight_scale` (compressed-tensors, AutoFP8, the Skywork fork of vLLM). Files also carry scales of *activations*
(`X.act_scale`, `X.input_scale`), which calibrated engines use and which do not change the weights. `pair_scales` turns
such a listing into the plain one that the rest of the program knows: the weights alone, in a plain type.

Nothing is guessed where it matters. A weight without a scale, a scale without a weight, a scale of another shape or
type than the scheme has, FP8 in a module that config.json says is not quantized: each is an error that names the
tensor. Only where config.json is silent (June 2024's vLLM was told on its command line) does the shape decide.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from skymoe.base.dtype import DType
from skymoe.base.errors import FormatError
from skymoe.base.log import logger
from skymoe.spec.fields import Fields
from skymoe.spec.hf import CONFIG_NAME, read_config
from skymoe.spec.quantization import DEFAULT_BLOCK, FIELD, Fp8Scheme, QuantizationSpec, read_quantization, scale_shape
from skymoe.weights.header import TensorInfo

SCALE_SUFFIXES = ("_scale_inv", "_scale")  # after `X.weight`
ACTIVATION_SCALES = (".act_scale", ".input_scale", ".activation_scale")
SCALE_DTYPES = (DType.FLOAT32, DType.BFLOAT16, DType.FLOAT16)
_WEIGHT = ".weight"
_DISAGREE = f"{FIELD} of config.json and the weight files contradict each other"


@dataclass(frozen=True)
class Scaled:
    """An FP8 weight on disk.

    Attributes:
        info: of the weight itself, as in the file.
        scale: name of the tensor of its scales.
        scheme, block_size: which weights share one.
    """

    info: TensorInfo
    scale: str
    scheme: Fp8Scheme
    block_size: tuple[int, int]


@dataclass(frozen=True)
class Listing:
    """The tensors of a directory as the rest of the program sees them.

    Attributes:
        tensors: logical name to dtype and shape, in the order of the files; no scales.
        scaled: those among them that are FP8 on disk.
        activation_scales: names that are passed over.
    """

    tensors: Mapping[str, TensorInfo]
    scaled: Mapping[str, Scaled]
    activation_scales: tuple[str, ...]


def list_tensors(directory: Path, tensors: Mapping[str, TensorInfo], *, decode_to: DType = DType.BFLOAT16) -> Listing:
    """`tensors` of the files in `directory` as a model's reader sees them, by what its config.json says.

    Raises:
        FormatError: see `scales.pair_scales` and `spec.quantization.read_quantization`.
    """
    path = directory / CONFIG_NAME
    quantization = read_quantization(Fields(read_config(directory), path)) if path.exists() else None
    listing = pair_scales(tensors, quantization, decode_to, where=directory)
    if listing.scaled:
        schemes = ", ".join(sorted({pair.scheme for pair in listing.scaled.values()}))
        told = "" if quantization else "; config.json does not say so, the scales' shapes do"
        logger.debug("%s: %d FP8 weights (%s)%s", directory, len(listing.scaled), schemes, told)
    return listing


def pair_scales(
    tensors: Mapping[str, TensorInfo], quantization: QuantizationSpec | None, decoded: DType, *, where: object
) -> Listing:
    """The plain listing of `tensors`.

    Args:
        tensors: as in the files.
        quantization: what config.json says; None when it says nothing.
        decoded: the type that FP8 weights are given out in.
        where: the directory, named in errors.

    Raises:
        FormatError: naming the tensor that does not fit.
    """
    weights = [name for name, info in tensors.items() if info.dtype in (DType.FLOAT8_E4M3, DType.FLOAT8_E5M2)]
    if not weights:
        if quantization is not None:
            what = f"config.json says that the weights are FP8 ({quantization.scheme}), but no tensor is"
            raise FormatError(what, where=where, why=_DISAGREE, hint=f"remove {FIELD} if the weights are plain")
        return Listing(tensors, {}, ())
    kept = frozenset(quantization.not_converted) if quantization else frozenset()
    scaled = {name: _pair(name, tensors, quantization, kept, where) for name in weights}
    passed = tuple(name for name in tensors if name.endswith(ACTIVATION_SCALES))
    hidden = {pair.scale for pair in scaled.values()}.union(passed)
    _refuse_lonely_scales(tensors, hidden, where)
    logical = {
        name: TensorInfo(decoded, info.shape) if name in scaled else info
        for name, info in tensors.items()
        if name not in hidden
    }
    return Listing(logical, scaled, passed)


def _pair(
    name: str,
    tensors: Mapping[str, TensorInfo],
    quantization: QuantizationSpec | None,
    kept: Collection[str],
    where: object,
) -> Scaled:
    info = tensors[name]
    if info.dtype is DType.FLOAT8_E5M2:
        raise FormatError(f"tensor {name} is {info.dtype}", where=where, why="of the FP8 formats only e4m3 is read")
    if len(info.shape) != 2 or not name.endswith(_WEIGHT):
        what = f"tensor {name} {list(info.shape)} is FP8, but is not the matrix of a linear layer"
        raise FormatError(what, where=where, why="scales are read for matrices called ....weight, one expert each")
    found = [name + suffix for suffix in SCALE_SUFFIXES if name + suffix in tensors]
    if len(found) != 1:
        what = f"tensor {name} is FP8 and has two scales" if found else f"tensor {name} is FP8 and has no scale"
        raise FormatError(what, where=where, why=f"looked for {', '.join(name + s for s in SCALE_SUFFIXES)}")
    scale = tensors[found[0]]
    if scale.dtype not in SCALE_DTYPES:
        raise FormatError(f"tensor {found[0]} is {scale.dtype}", where=where, why="scales are plain floats")
    if quantization is None:
        return Scaled(info, found[0], _scheme_of(name, info, found[0], scale, where), DEFAULT_BLOCK)
    if _is_kept(name.removesuffix(_WEIGHT), kept):
        what = f"tensor {name} is FP8, but config.json says that this module is not converted"
        raise FormatError(what, where=where, why=_DISAGREE)
    scheme, block = quantization.scheme, quantization.block_size
    if not _fits(scale.shape, scheme, info.shape, block):
        expected = list(scale_shape(scheme, info.shape, block))
        what = (
            f"tensor {found[0]} is {list(scale.shape)}, expected {expected} for {scheme} scales of {list(info.shape)}"
        )
        raise FormatError(what, where=where, why=_DISAGREE)
    return Scaled(info, found[0], scheme, block)


def _fits(scale: tuple[int, ...], scheme: Fp8Scheme, weight: tuple[int, ...], block: tuple[int, int]) -> bool:
    match scheme:
        case Fp8Scheme.BLOCK:
            return scale == scale_shape(scheme, weight, block)
        case Fp8Scheme.CHANNEL:
            return scale in ((weight[0], 1), weight[:1])
        case Fp8Scheme.TENSOR:
            return scale in ((), (1,), (1, 1))


def _scheme_of(name: str, weight: TensorInfo, scale_name: str, scale: TensorInfo, where: object) -> Fp8Scheme:
    """The scheme that the shape of a scale shows. A scale of one number for one row or block: all are the same."""
    for scheme in (Fp8Scheme.TENSOR, Fp8Scheme.CHANNEL, Fp8Scheme.BLOCK):
        if _fits(scale.shape, scheme, weight.shape, DEFAULT_BLOCK):
            return scheme
    what = f"tensor {scale_name} is {list(scale.shape)}, which fits no scheme for {name} {list(weight.shape)}"
    shapes = ", ".join(f"{scheme} {list(scale_shape(scheme, weight.shape))}" for scheme in Fp8Scheme)
    raise FormatError(what, where=where, why=f"expected one of {shapes}")


def _is_kept(module: str, kept: Collection[str]) -> bool:
    """Whether `module`, or a module around it, is named in full. Patterns are not followed."""
    parts = module.split(".")
    return any(".".join(parts[:end]) in kept for end in range(1, len(parts) + 1))


def _refuse_lonely_scales(tensors: Mapping[str, TensorInfo], known: set[str], where: object) -> None:
    for name in tensors:
        weight = next((name.removesuffix(suffix) for suffix in SCALE_SUFFIXES if name.endswith(_WEIGHT + suffix)), None)
        if weight is not None and name not in known:
            why = f"{weight} is {tensors[weight].dtype}" if weight in tensors else f"there is no {weight}"
            raise FormatError(f"tensor {name} is the scale of no FP8 weight", where=where, why=why)
