"""What a training or memory case measured, beside what is predicted.

*Speed* is compared as the time of a step, by whichever figure the source prints: tokens per second (of a GPU or of
all), samples per second, step time, and only when there is none of these FLOP/s or MFU, by the source's own count of
FLOPs (conventions.py). *Memory* is what the allocator holds at the peak of the fullest rank, as frameworks print it;
the planner's reserve for context and fragmentation is left out on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from skymoe.plan.hardware.gpu import Precision
from skymoe.plan.memory.model import sizes
from skymoe.plan.validate.cases import Case, NotJudgedError
from skymoe.plan.validate.conventions import convention_of, counted_flops
from skymoe.plan.validate.predict import Prediction, predict, share_again
from skymoe.plan.validate.result import Comparison

_PEAKS: Final = (
    ("measured.peak_mem_gb_max_over_ranks", 2**30),  # from V to 2 V they grow by 16.0 bytes a weight, in GiB only
    ("measured.peak_mem_gb", 1e9),
    ("measured.peak_mem_gib", 2**30),
    ("measured.peak_memory_gb", 1e9),
)


def compare(case: Case) -> tuple[Comparison, ...]:
    """All that can be compared of a training or memory case. Raises NotJudgedError when there is nothing."""
    prediction = predict(case)
    found = tuple(_figures(case, prediction))
    if not found:
        raise NotJudgedError("nothing that was measured is predicted")
    return found


def _figures(case: Case, prediction: Prediction) -> Iterator[Comparison]:
    is_moe = any(layer.ffn.is_moe for layer in prediction.work.shape.layers)

    def comparison(quantity: str, unit: str, predicted: float, measured: float) -> Comparison:
        return Comparison(
            case=case.id, group=case.group, quantity=quantity, unit=unit, predicted=predicted, measured=measured,
            known=prediction.layout.known, moe=is_moe, assumed=prediction.assumed,
        )  # fmt: skip

    if case.kind == "training":
        seconds = measured_step_s(case, prediction)
        if seconds is not None:
            yield comparison("step_time", "s", prediction.estimate.step_s, seconds)
    for path, unit in _PEAKS:
        if case.has(path):
            peak = max(rank.allocated for rank in prediction.estimate.memory)
            yield comparison("memory", "GB", peak / 1e9, case.number(path, low=1e-3) * unit / 1e9)
            break
    first = prediction.estimate.memory[0]
    if case.has("measured.activations_gib"):
        measured = case.number("measured.activations_gib", low=1e-6)
        yield comparison("activations", "GiB", first.activations / 2**30, measured)
    if case.has("measured.params_and_optimizer_gib"):
        measured = case.number("measured.params_and_optimizer_gib", low=1e-6)
        static = first.weights + first.gradients + first.optimizer - _embedding_static(prediction)
        yield comparison("static_memory", "GiB", static / 2**30, measured)


def _embedding_static(prediction: Prediction) -> float:
    """The source of these figures counts layers only."""
    return sizes(prediction.work).embedding.static


def measured_step_s(case: Case, prediction: Prediction) -> float | None:
    """Seconds of a step as measured; None when no figure says."""
    work, gpus = prediction.work, prediction.work.division.world_size
    rate = None
    if case.has("measured.step_time_s") and case.has("batch.global_batch_size"):
        return case.number("measured.step_time_s", low=1e-6)
    if case.has("measured.tokens_per_s_per_gpu"):
        rate = case.number("measured.tokens_per_s_per_gpu", low=1e-3)
    elif case.has("measured.tokens_per_s"):
        rate = case.number("measured.tokens_per_s", low=1e-3) / gpus
    elif case.has("measured.samples_per_s_per_gpu"):
        rate = case.number("measured.samples_per_s_per_gpu", low=1e-6) * work.sequence_length
    else:
        flops_per_s = _measured_flops(case, prediction)
        if flops_per_s is not None:
            convention, _ = convention_of(case)
            again = share_again(prediction)
            rate = flops_per_s / counted_flops(work.shape, work.sequence_length, convention, again=again)
    return work.step_tokens / gpus / rate if rate else None


def _measured_flops(case: Case, prediction: Prediction) -> float | None:
    """FLOP/s of a GPU, from FLOP/s or a share of the peak."""
    if case.has("measured.tflops_per_gpu"):
        return case.number("measured.tflops_per_gpu", low=1e-3) * 1e12
    if not case.has("measured.mfu"):
        return None
    gpu, precision = prediction.work.cluster.gpu, prediction.work.precision
    own = gpu.peak.get(precision, gpu.peak[Precision.BF16])
    narrow = precision is not Precision.BF16 and "fp8" in case.text("flops_convention").lower()
    peak = own if narrow else gpu.peak[Precision.BF16]
    share = case.number("measured.mfu", low=1e-4, high=100)
    return peak * (share / 100 if share > 1.5 else share)
