"""Searches the few constants of each GPU type on half of the published runs; says how far off they are on both halves.

    python benchmarks/calibrate.py --cases CASES.json

Constants per family of GPUs: the share of the peak that matrix products reach in 16 bits and in 8 or fewer, and that
fused attention reaches. Least squares on the logarithm of predicted / measured step time, with errors beyond 30 %
counted as 30 % (a wrong guess of what a table leaves out must not bend a law), each group weighted by the root of its
size; a coordinate search, for there are three constants at most. The half of the cases whose name's SHA-256 is even is
fitted, the other half is only looked at.

One full prediction per case is scaled: pipeline time in proportion to the sum of its stages' times. It prints lines for
`skymoe/plan/hardware/gpus.yaml`; nothing is written. The catalogue's constants are near what was printed, chosen by
hand with both halves in view, and the search starts from them: the other half's error is no clean held-out one.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from skymoe.plan.hardware.gpu import Laws
from skymoe.plan.train.stages import stage_times
from skymoe.plan.validate.cases import Case, NotJudgedError, read_cases
from skymoe.plan.validate.compare import measured_step_s
from skymoe.plan.validate.mappings import with_mappings
from skymoe.plan.validate.predict import Prediction, predict
from skymoe.plan.validate.published import published_prices

FAMILIES: Mapping[str, Sequence[str]] = {
    "A100, A800": ("a100-80g", "a100-40g", "a800-80g"),
    "H100, H800, H200": ("h100-80g", "h800-80g", "h200"),
    "H100 96 GB, 500 W": ("h100-96g",),
    "B200, B300": ("b200", "b300"),
    "GB200, GB300": ("gb200", "gb300"),
}
CONSTANTS = ("gemm", "gemm_narrow", "attention")
STEPS = (0.08, 0.04, 0.02, 0.01)
LARGEST = math.log(1.3)


@dataclass(frozen=True)
class Run:
    """A case with its prediction.

    Attributes:
        case: the case.
        prediction: with the constants of the catalogue.
        measured_s: of a step.
        busy_s: the sum of its stages' times.
    """

    case: Case
    prediction: Prediction
    measured_s: float
    busy_s: float

    @property
    def fitted(self) -> bool:
        """Whether it is in the half that is fitted."""
        return hashlib.sha256(self.case.id.encode()).digest()[0] % 2 == 0

    def log_ratio(self, factors: Mapping[str, float]) -> float:
        """log(predicted / measured) when the laws of the catalogue are multiplied by `factors`."""
        work, estimate = self.prediction.work, self.prediction.estimate
        laws = scaled(work.cluster.gpu.laws, factors)
        gpu = replace(work.cluster.gpu, laws=laws)
        other = replace(work, cluster=replace(work.cluster, gpu=gpu))
        pipeline = estimate.pipeline_s * busy(self.prediction, other) / self.busy_s
        return math.log((estimate.step_s - estimate.pipeline_s + pipeline) / self.measured_s)


def scaled(laws: Laws, factors: Mapping[str, float]) -> Laws:
    """`laws` with some constants multiplied."""
    return replace(laws, **{name: getattr(laws, name) * factor for name, factor in factors.items()})


def busy(prediction: Prediction, work) -> float:  # type: ignore[no-untyped-def]
    """Seconds of all stages' passes of one micro-batch."""
    times = stage_times(
        published_prices(work, prediction.model, prediction.layout), prediction.stages, prediction.recompute
    )
    return sum(times.forward_s) + sum(times.backward_s)


def runs_of(cases: Sequence[Case]) -> list[Run]:
    """Training cases that can be predicted."""
    found = []
    for case in cases:
        if case.kind != "training":
            continue
        try:
            prediction = predict(case)
            seconds = measured_step_s(case, prediction)
        except NotJudgedError:
            continue
        if seconds is not None:
            found.append(Run(case, prediction, seconds, busy(prediction, prediction.work)))
    return found


def loss(runs: Sequence[Run], factors: Mapping[str, float], sizes: Mapping[str, int]) -> float:
    """Weighted mean of squares of bounded logarithms."""
    weights = [1.0 / math.sqrt(sizes[run.case.group]) for run in runs]
    squares = [min(LARGEST, abs(run.log_ratio(factors))) ** 2 for run in runs]
    return sum(w * s for w, s in zip(weights, squares, strict=True)) / sum(weights)


def fit(runs: Sequence[Run]) -> dict[str, float]:
    """Factors on the catalogue's constants: coordinate search from 1, steps made smaller."""
    sizes = Counter(run.case.group for run in runs)
    factors = dict.fromkeys(CONSTANTS, 1.0)
    best = loss(runs, factors, sizes)
    for step in STEPS:
        improved = True
        while improved:
            improved = False
            for name in CONSTANTS:
                for direction in (1 + step, 1 / (1 + step)):
                    trial = {**factors, name: factors[name] * direction}
                    value = loss(runs, trial, sizes) + 1e-4 * math.log(trial[name]) ** 2
                    if value < best - 1e-7:
                        best, factors, improved = value, trial, True
    return factors


def mape(runs: Sequence[Run], factors: Mapping[str, float]) -> str:
    """Mean absolute error, in words."""
    errors = [abs(math.expm1(run.log_ratio(factors))) for run in runs]
    return f"{sum(errors) / len(errors):6.1%} of {len(errors):3d}" if errors else "      -       "


def main() -> None:
    """Fit every family, print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=Path, required=True)
    runs = runs_of(with_mappings(read_cases(parser.parse_args().cases)[0]))
    for family, names in FAMILIES.items():
        own = [run for run in runs if run.prediction.work.cluster.gpu.name in names]
        half, rest = [run for run in own if run.fitted], [run for run in own if not run.fitted]
        if len(half) < 5:
            print(f"{family}: {len(own)} cases are too few; constants are those of the nearest type")
            continue
        factors = fit(half)
        print(f"{family}: mean error of the fitted half {mape(half, {})} -> {mape(half, factors)}")
        print(f"{' ' * len(family)}              the other half {mape(rest, {})} -> {mape(rest, factors)}")
        for group in sorted({run.case.group for run in own}):
            members = [run for run in own if run.case.group == group]
            bias = sum(run.log_ratio(factors) for run in members) / len(members)
            print(f"    {group:28s} {mape(members, {})} -> {mape(members, factors)}  bias {bias:+.1%}")
        for name in names:
            gpu = next(
                (run.prediction.work.cluster.gpu for run in own if run.prediction.work.cluster.gpu.name == name), None
            )
            if gpu is not None:
                laws = scaled(gpu.laws, factors)
                line = ", ".join(f"{constant}: {getattr(laws, constant):.3f}" for constant in CONSTANTS)
                print(f"  {name}: laws: {{{line}}}  # {', '.join(f'{k} x {v:.3f}' for k, v in factors.items())}")


if __name__ == "__main__":
    main()
