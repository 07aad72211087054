"""Which native mixtures transformers runs as it is set up, and what to tell it where it does not. No torch.

transformers computes all experts of a layer in one call of torch's `grouped_mm`, which takes matrices whose rows begin
at multiples of 16 bytes and raises "strides should be multiple of 16 bytes" for others: width and hidden size must be
multiples of 8 in 16 bits, of 4 in fp32. Its `eager` implementation, one expert after another, takes any size. Found by
trying, with transformers 5.23 and torch 2.13. Our own modelling files have no such limit.
"""

from __future__ import annotations

from skymoe.base.dtype import DType
from skymoe.spec.model import Architecture, ModelSpec

_NATIVE = (Architecture.MIXTRAL, Architecture.QWEN2_MOE, Architecture.QWEN3_MOE, Architecture.OLMOE)
_ROW_BYTES = 16


def grouped_mm_remarks(spec: ModelSpec, dtype: DType) -> tuple[str, ...]:
    """A remark when transformers refuses to run a model of `spec` in `dtype` unless it is told how."""
    if spec.architecture not in _NATIVE or spec.moe is None:
        return ()
    step = _ROW_BYTES // dtype.itemsize
    sizes = {"experts of width": spec.moe.ffn_size, "hidden size": spec.hidden_size}
    odd = [f"{name} {size} ({-(-size // step) * step} would do)" for name, size in sizes.items() if size % step]
    if not odd:
        return ()
    what = f"{' and '.join(odd)}: transformers wants multiples of {step} in {dtype}"
    return (f'{what}; from_pretrained(..., experts_implementation="eager") takes any',)
