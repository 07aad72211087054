"""What rounding did to each matrix, measured on the numbers that are written.

e4m3 keeps 4 significant bits, so each weight is off by up to 1/17 of itself and by 2.6 % in the mean square, whatever
the scheme, as long as the weights of a group are within a factor of some hundred of each other. A matrix with a few
huge weights has its small ones rounded to multiples of 2^-9 of the scale: `rms` shows that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import fsum
from pathlib import Path
from typing import Any

from torch import Tensor

from skymoe.convert.parents import Parent
from skymoe.convert.replay import read_source
from skymoe.ops.fp8 import rounding_error
from skymoe.quantize.plan import QuantizePlan, ToFp8
from skymoe.quantize.result import TensorError
from skymoe.spec.quantization import Fp8Scheme
from skymoe.weights.reader import WeightsReader

AUDIT_NAME = "audit.json"
NUM_WORST = 8


def measure_matrix(name: str, weight_OI: Tensor, codes_OI: Tensor, scale: Tensor, scheme: Fp8Scheme) -> TensorError:
    """The figures of one matrix, called `name` in the output."""
    error = rounding_error(weight_OI, codes_OI, scale, scheme)
    return TensorError(name, _rounded(error.rms), _rounded(error.max))


def complete(
    found: Mapping[str, TensorError], plan: QuantizePlan, parent: Parent, staging: Path
) -> tuple[TensorError, ...]:
    """The errors of all matrices, in file order. Those that an earlier, interrupted run wrote are read again."""
    errors = []
    operations = [step.operation for step in plan.conversion.steps if isinstance(step.operation, ToFp8)]
    with WeightsReader(staging) as reader:
        for operation in operations:
            for name, source in zip(operation.names, operation.matrices, strict=True):
                error = found.get(name)
                if error is None:
                    codes, scale = reader.tensor(name), reader.tensor(name + plan.quantization.scale_suffix)
                    error = measure_matrix(name, read_source([parent], source), codes, scale, operation.scheme)
                errors.append(error)
    return tuple(errors)


def worst(errors: Sequence[TensorError]) -> tuple[TensorError, ...]:
    """The matrices with the largest relative errors, worst first."""
    return tuple(sorted(errors, key=lambda error: -error.rms)[:NUM_WORST])


def as_json(errors: Sequence[TensorError], scheme: Fp8Scheme) -> dict[str, Any]:
    """The content of audit.json."""
    return {
        "scheme": scheme.value,
        "rms": "root of the mean square error over that of the weights",
        "max": "largest error of any weight over the largest weight",
        "mean_rms": mean_rms(errors),
        "tensors": {error.name: {"rms": error.rms, "max": error.max} for error in errors},
    }


def mean_rms(errors: Sequence[TensorError]) -> float:
    """The mean over the matrices; 0 of none."""
    return _rounded(fsum(error.rms for error in errors) / max(len(errors), 1))


def _rounded(figure: float) -> float:
    """To 5 digits: beyond them, sums in fp32 depend on the machine."""
    return float(f"{figure:.5g}")
