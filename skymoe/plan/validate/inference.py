"""Published inference figures against the model of `plan/serve`.

The workloads are those that the sources document: TensorRT-LLM's tables are of `trtllm-bench throughput`, all requests
at once, with the number of requests that its pages print for each pair of lengths; gpt-fast is batch 1 with a prompt of
5 tokens and 200 new ones; llama.cpp is one stream, layers divided over GPUs that work one after another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from skymoe.base.errors import ConfigError
from skymoe.plan.hardware.gpu import Gpu, Precision
from skymoe.plan.serve.divide import choose
from skymoe.plan.serve.engine import Engine, find_engine
from skymoe.plan.serve.model import Served
from skymoe.plan.serve.pieces import Wish
from skymoe.plan.serve.shares import Shares, kv_token_bytes, weight_bytes
from skymoe.plan.serve.step import Load, Setting, settings, total_s
from skymoe.plan.serve.workload import Workload, first_token_s, most_sequences, tokens_per_s
from skymoe.plan.validate.cases import Case, NotJudged, NotJudgedError
from skymoe.plan.validate.machines import case_gpu
from skymoe.plan.validate.models import case_model
from skymoe.plan.validate.result import Comparison, GroupResult, grouped

# prompt, output: requests (docs/source/performance/perf-overview.md of TensorRT-LLM, "Preparing a Dataset")
_REQUESTS: Final = {
    (128, 128): 30000, (128, 2048): 3000, (128, 4096): 1500, (500, 2000): 3000, (1000, 1000): 3000,
    (1000, 2000): 1500, (2048, 128): 3000, (2048, 2048): 1500, (5000, 500): 1500, (20000, 2000): 1000,
}  # fmt: skip
_OTHER_REQUESTS: Final = 3000
_GPT_FAST_TOKENS: Final = 200
_SKYWORK_BATCH, _SKYWORK_TOKENS = 112, 192

# how weights are stored: bytes per element of layers, of embedding and head, and what is multiplied
_FORMATS: Final = {
    "fp32": (4.0, 4.0, Precision.FP32),
    "fp16": (2.0, 2.0, Precision.BF16),
    "bf16": (2.0, 2.0, Precision.BF16),
    "fp8": (1.0, 2.0, Precision.FP8),
    "fp4": (0.5625, 2.0, Precision.NVFP4),  # a scale byte per 16 elements
    "nvfp4": (0.5625, 2.0, Precision.NVFP4),
    "int8w": (1.0, 1.0, Precision.INT8),
    "int4w g32": (0.625, 0.625, Precision.INT4),  # scale and zero in 16 bits per 32 elements
    "q4_k_m": (0.606, 0.82, Precision.INT4),  # 4.85 bits; the head is Q6_K
    "q8_0": (1.0625, 1.0625, Precision.INT8),
}


def inference_groups(cases: Iterable[Case]) -> list[GroupResult]:
    """The inference cases among `cases`, compared, by group and quantity."""
    found: list[Comparison] = []
    aside: list[NotJudged] = []
    for case in cases:
        if case.kind != "inference":
            continue
        try:
            found += compare(case)
        except NotJudgedError as reason:
            aside.append(NotJudged(case.id, case.group, str(reason)))
        except ConfigError as error:
            aside.append(NotJudged(case.id, case.group, error.what))
    return grouped(found, aside, {})


def compare(case: Case) -> list[Comparison]:
    """Every figure of one case that can be predicted. Raises NotJudgedError."""
    if case.group.startswith("trtllm"):
        return [_saturated(case)]
    if case.group == "gpt_fast":
        return [_decoded(case)]
    if case.group == "llama_cpp":
        return _sequential(case)
    if case.group == "skywork":
        return [_published_batch(case)]
    raise NotJudgedError("batch and lengths are not published")


def _served(case: Case, *, narrow_kv: bool) -> Served:
    name = case.text("precision").lower()
    if name not in _FORMATS:
        raise NotJudgedError(f"precision {name or 'absent'!r} is not known")
    weights, head, compute = _FORMATS[name]
    kv = 1.0 if narrow_kv and compute in (Precision.FP8, Precision.NVFP4) else 2.0
    return Served(shape=case_model(case).shape, weight_bytes=weights, compute=compute, kv_bytes=kv, head_bytes=head)


def _shares(served: Served, gpus: Sequence[Gpu]) -> Shares:
    """As engines divide equal GPUs: as even as possible; whether it fits is the caller's affair."""
    shares = choose(served, gpus, [1e18] * len(gpus), Wish(kv_tokens=1, load_tokens=1))
    assert shares is not None
    return shares


def kv_room(served: Served, gpu: Gpu, shares: Shares, engine: Engine, stages: int) -> float:
    """Tokens that have room, on the fullest GPU of the fullest stage; at least 0."""
    ends = shares.rows[0] * served.shape.hidden_size * (1 if served.shape.tied else 2) * served.head_bytes
    layers = (weight_bytes(served, shares, 0) - ends) / stages
    room = (
        gpu.memory - engine.reserved(gpu.memory) - layers - (ends if stages == 1 else ends / 2)
    ) * engine.kv_fraction
    return max(0.0, room / (kv_token_bytes(served, shares, 0) / stages))


def _comparison(case: Case, quantity: str, predicted: float, measured: float, *assumed: str) -> Comparison:
    return Comparison(
        case=case.id, group=case.group, quantity=quantity, unit="tokens/s", predicted=predicted, measured=measured,
        moe=case.has("model.moe"), assumed=assumed, known=not assumed,
    )  # fmt: skip


def _saturated(case: Case) -> Comparison:
    """Output tokens per second of all requests at once."""
    measured = case.number("measured.output_tokens_per_s", low=1e-3)
    engine = find_engine("trtllm-engine" if case.group == "trtllm_v0.17" else "trtllm-pytorch")
    served, gpu = _served(case, narrow_kv=True), case_gpu(case)
    tp, pp = case.count("parallel.tp", 1, high=64), case.count("parallel.pp", 1, high=64)
    prompt, output = case.count("batch.input_len"), case.count("batch.output_len")
    requests = _REQUESTS.get((prompt, output), _OTHER_REQUESTS)
    workload = Workload(prompt=prompt, output=output, requests=requests)
    shares = _shares(served, (gpu,) * tp)
    batch = most_sequences(workload, kv_room(served, gpu, shares, engine, pp), engine.max_batch)
    stages = settings(served, (gpu,) * tp, shares, engine, parts=pp)
    assumed = ("one sequence at a time, though none has room",) if batch < 1 else ()
    return _comparison(case, "throughput", tokens_per_s(stages, workload, max(1, batch)), measured, *assumed)


def _decoded(case: Case) -> Comparison:
    """Tokens per second of one sequence."""
    engine, served, gpu = find_engine("gpt-fast"), _served(case, narrow_kv=False), case_gpu(case)
    gpus = (gpu,) * case.count("parallel.tp", 1, high=64)
    (stage,) = settings(served, gpus, _shares(served, gpus), engine)
    context = case.count("batch.prompt_len", 5) + _GPT_FAST_TOKENS / 2
    step = total_s(stage, Load(decode=1, context=context))
    return _comparison(case, "decode", 1 / step, case.number("measured.decode_tokens_per_s", low=1e-3))


def _published_batch(case: Case) -> Comparison:
    """Skywork-MoE's 2,200 tokens/s: neither batch nor lengths are published, so both are assumed."""
    engine, served, gpu = find_engine("skymoe"), _served(case, narrow_kv=False), case_gpu(case)
    gpus = (gpu,) * case.count("parallel.tp", low=1, high=64)
    (stage,) = settings(served, gpus, _shares(served, gpus), engine)
    step = total_s(stage, Load(decode=_SKYWORK_BATCH, context=_SKYWORK_TOKENS))
    measured = case.number("measured.total_tokens_per_s", low=1e-3)
    assumed = f"batch {_SKYWORK_BATCH}, {_SKYWORK_TOKENS} tokens of context"
    return _comparison(case, "throughput", _SKYWORK_BATCH / step, measured, assumed)


def _sequential(case: Case) -> list[Comparison]:
    """Decoding and prompt of one stream over GPUs that work one after another."""
    engine, served, gpu = find_engine("llama.cpp"), _served(case, narrow_kv=False), case_gpu(case)
    pp = case.count("parallel.pp", 1, high=64)
    stages = settings(served, (gpu,), _shares(served, (gpu,)), engine, parts=pp)
    prompt, output = case.count("batch.prompt_len", 1024), case.count("batch.gen_len", 1024)
    step = sum(total_s(stage, Load(decode=1, context=output / 2)) for stage in stages)
    found = [_comparison(case, "decode", 1 / step, case.number("measured.decode_tokens_per_s", low=1e-3))]
    if case.has("measured.prefill_tokens_per_s"):
        seconds = prompt_s(stages, prompt, engine.chunk)
        measured = case.number("measured.prefill_tokens_per_s", low=1e-3)
        found.append(_comparison(case, "prefill", prompt / seconds, measured))
    return found


def prompt_s(stages: Sequence[Setting], prompt: int, chunk: int) -> float:
    """Seconds of a prompt whose parts follow each other through the stages."""
    alone = first_token_s(stages, prompt, chunk)
    parts = -(-prompt // chunk)
    return alone * (parts + len(stages) - 1) / (parts * len(stages))
