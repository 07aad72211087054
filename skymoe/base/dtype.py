"""Dtype names and sizes, without torch. The names are those of safetensors headers and of torch, in one table."""

from __future__ import annotations

from enum import StrEnum


class DType(StrEnum):
    """A tensor element type by its torch name."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT64 = "float64"
    FLOAT8_E4M3 = "float8_e4m3fn"
    FLOAT8_E5M2 = "float8_e5m2"
    INT8 = "int8"
    UINT8 = "uint8"
    INT16 = "int16"
    INT32 = "int32"
    INT64 = "int64"
    BOOL = "bool"

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return _ITEMSIZE[self]

    @property
    def safetensors_name(self) -> str:
        """The name in a safetensors header."""
        return _SAFETENSORS[self]

    @classmethod
    def from_safetensors(cls, name: str) -> DType:
        """The dtype of a safetensors header name. Raises KeyError for one we do not read."""
        return _FROM_SAFETENSORS[name]


_ITEMSIZE = {
    DType.FLOAT32: 4, DType.BFLOAT16: 2, DType.FLOAT16: 2, DType.FLOAT64: 8, DType.FLOAT8_E4M3: 1, DType.FLOAT8_E5M2: 1,
    DType.INT8: 1, DType.UINT8: 1, DType.INT16: 2, DType.INT32: 4, DType.INT64: 8, DType.BOOL: 1,
}  # fmt: skip
_SAFETENSORS = {
    DType.FLOAT32: "F32", DType.BFLOAT16: "BF16", DType.FLOAT16: "F16", DType.FLOAT64: "F64",
    DType.FLOAT8_E4M3: "F8_E4M3", DType.FLOAT8_E5M2: "F8_E5M2", DType.INT8: "I8", DType.UINT8: "U8",
    DType.INT16: "I16", DType.INT32: "I32", DType.INT64: "I64", DType.BOOL: "BOOL",
}  # fmt: skip
_FROM_SAFETENSORS = {name: dtype for dtype, name in _SAFETENSORS.items()}
