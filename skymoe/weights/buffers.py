"""Tensors as bytes and bytes as tensors, without a copy and without a pickle. The one table of torch dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from skymoe.base.dtype import DType
from skymoe.base.errors import FormatError
from skymoe.weights.header import TensorInfo

_TORCH = {
    DType.FLOAT32: torch.float32, DType.BFLOAT16: torch.bfloat16, DType.FLOAT16: torch.float16,
    DType.FLOAT64: torch.float64, DType.FLOAT8_E4M3: torch.float8_e4m3fn, DType.FLOAT8_E5M2: torch.float8_e5m2,
    DType.INT8: torch.int8, DType.UINT8: torch.uint8, DType.INT16: torch.int16, DType.INT32: torch.int32,
    DType.INT64: torch.int64, DType.BOOL: torch.bool,
}  # fmt: skip
_FROM_TORCH = {torch_type: dtype for dtype, torch_type in _TORCH.items()}


def torch_dtype(dtype: DType) -> torch.dtype:
    """The torch type of `dtype`."""
    return _TORCH[dtype]


def info_of(name: str, tensor: Tensor) -> TensorInfo:
    """Dtype and shape of `tensor`. Raises FormatError, naming `name`, for a type we do not store."""
    if tensor.dtype not in _FROM_TORCH:
        raise FormatError(f"tensor {name}: {tensor.dtype} cannot be stored")
    return TensorInfo(_FROM_TORCH[tensor.dtype], tuple(tensor.shape))


def bytes_of(tensor: Tensor) -> memoryview:
    """The elements of `tensor` in row-major order as bytes: its own memory when it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def empty(info: TensorInfo) -> Tensor:
    """An uninitialised CPU tensor to read into (through `bytes_of`)."""
    return torch.empty(info.shape, dtype=_TORCH[info.dtype])
