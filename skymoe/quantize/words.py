"""What the user should know of an FP8 model. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum

from skymoe.quantize.plan import QuantizePlan
from skymoe.quantize.result import TensorError
from skymoe.spec.model import Architecture, ModelSpec
from skymoe.spec.quantization import Fp8Scheme

_READERS = {
    Fp8Scheme.BLOCK: "transformers (decoded where there is no GPU that computes in FP8), vLLM, SGLang",
    Fp8Scheme.CHANNEL: "vLLM; transformers with the package compressed-tensors, which also rounds the activations",
    Fp8Scheme.TENSOR: "vLLM; transformers does not read this form",
}

_SKYWORK = (Architecture.SKYWORK, Architecture.SKYWORK_MOE)
_SKYWORK_READERS = "no class of transformers or of today's vLLM has these names; export first, to one that they read"


def remarks(plan: QuantizePlan, spec: ModelSpec) -> tuple[str, ...]:
    """What is out of the ordinary, and who reads the result."""
    scheme = plan.quantization.scheme
    told = [f"read by {_READERS[scheme]}"] if spec.architecture not in _SKYWORK else [_SKYWORK_READERS]
    if plan.unfit:
        why = "a side that is no multiple of 128, which neither transformers nor vLLM can scale by block"
        count, example = len(plan.unfit), plan.unfit[0]
        told.append(f"{count} matrices stay as they are ({example}, ...): they, or one fused with them, have {why}")
    if plan.rounded:
        which = f"{len(plan.rounded)} of the tensors that are not FP8 ({plan.rounded[0]}, ...)"
        why = "transformers leaves them in the type that they are stored in, and computes with one type only"
        told.append(f"rounded to {plan.main_dtype}, the type of the embedding: {which}; {why}")
    if spec.architecture is Architecture.SKYMOE:
        told.append("transformers: needs trust_remote_code (or `import skymoe`), and dequantize=True on a GPU")
    return tuple(told)


def summary(plan: QuantizePlan, errors: Sequence[TensorError]) -> str:
    """Two sentences for the model card."""
    mean = fsum(error.rms for error in errors) / len(errors)
    done = f"{plan.tensors_quantized} matrices are e4m3 with one fp32 scale per {_GROUPS[plan.quantization.scheme]}"
    kept = "routers, gates, norms, biases, embedding and head are as they were"
    if plan.rounded:
        kept += f", but for {len(plan.rounded)} tensors that were rounded to {plan.main_dtype}"
    return f"{done}; {kept}. Rounding changed these matrices by {mean:.2%} in the root mean square (audit.json)."


_GROUPS = {Fp8Scheme.BLOCK: "128 x 128 weights", Fp8Scheme.CHANNEL: "row", Fp8Scheme.TENSOR: "matrix or fused matrices"}
