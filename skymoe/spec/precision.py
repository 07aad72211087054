"""PrecisionSpec: which number formats a job uses for weights, matmuls and gradients."""

from __future__ import annotations

from dataclasses import dataclass

from skymoe.base.dtype import DType
from skymoe.base.errors import ConfigError

_FLOATS = (DType.FLOAT32, DType.BFLOAT16, DType.FLOAT16, DType.FLOAT64)


@dataclass(frozen=True, kw_only=True)
class PrecisionSpec:
    """Formats of one job. The router, the norms and the loss are computed in fp32 whatever is chosen here.

    Attributes:
        weights: what the optimizer updates (the master copy).
        compute: what a matmul multiplies; below `weights` means autocast.
    """

    weights: DType = DType.FLOAT32
    compute: DType = DType.BFLOAT16

    def __post_init__(self) -> None:
        for name, dtype in (("weights", self.weights), ("compute", self.compute)):
            if dtype not in _FLOATS:
                raise ConfigError(f"precision.{name} must be one of {', '.join(_FLOATS)}, got {dtype}")

    @property
    def autocast(self) -> bool:
        """Whether matmuls run in a narrower format than the weights are kept in."""
        return self.compute != self.weights
