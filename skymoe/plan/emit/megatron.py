"""Megatron-LM: the layout string and flags (megatron/core/transformer/pipeline_parallel_layer_layout.py, 2025-26).

    Et*3|(tt|)*29,m|L     E embedding, t transformer layer, m multi-token prediction, L loss, | end of a stage;
                          x*n repeats a letter, (..)*n a group without groups in it; commas are for the eye

Stage s is on rank s mod PP, as in our interleaved schedule. The recompute flags have one count for all stages
(`block`: the first n layers of each), so a plan whose stages differ can only be approached, and says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, Final

from skymoe.plan.emit.whole import is_whole, whole_layers
from skymoe.plan.hardware.gpu import Precision
from skymoe.plan.shape import ModelShape
from skymoe.plan.work import Division, Recompute
from skymoe.spec.layout import DispatchMode, Layout, ScheduleKind


def layout_string(layers: Sequence[int]) -> str:
    """Transformer layers per stage as Megatron writes them; the first stage has E, the last L."""
    inner = [_letters(count) for count in layers[1:-1]]
    first, last = "E" + _letters(layers[0]), _letters(layers[-1])
    if len(layers) == 1:
        return f"{first},L" if layers[0] else "EL"
    words = []
    for word, group in groupby(inner):
        times = len(list(group))
        words.append(f"({word}|)*{times}" if times > 1 else f"{word}|")
    return f"{first}|{''.join(words)}{last},L" if last else f"{first}|{''.join(words)}L"


def _letters(count: int) -> str:
    return "t" * count if count < 3 else f"t*{count}"


_PRECISION: Final[dict[Precision, list[str]]] = {
    Precision.FP32: [],
    Precision.BF16: ["--bf16"],
    Precision.FP8: ["--bf16", "--fp8-format hybrid"],
}


def megatron(
    layout: Layout,
    shape: ModelShape,
    *,
    recompute: Recompute,
    micro_batch: int | None,
    num_micro: int | None,
    precision: Precision,
) -> tuple[dict[str, Any] | None, list[str]]:
    """`layout`, `flags`, `layers_per_stage`, and what they do not say; None where it cannot be run."""
    layers = whole_layers(layout.stages)
    if layers is None:
        return None, [f"Megatron-LM: {layout.num_stages} stages cut layers, and whole ones do not fill them"]
    notes = [] if is_whole(layout.stages) else [f"Megatron-LM: cuts within layers rounded to {list(layers)} layers"]
    division, flags = Division.of(layout), []
    flags += [f"--tensor-model-parallel-size {layout.tp}", f"--pipeline-model-parallel-size {layout.pp}"]
    string = layout_string(layers) if layout.num_stages > 1 else None
    if string is not None:
        flags.append(f'--pipeline-model-parallel-layout "{string}"')
    if any(layer.ffn.is_moe for layer in shape.layers):
        flags += [f"--expert-model-parallel-size {division.ep}", f"--expert-tensor-parallel-size {division.etp}"]
        dispatcher = "alltoall" if layout.dispatch is DispatchMode.ALL_TO_ALL else "allgather"
        flags.append(f"--moe-token-dispatcher-type {dispatcher}")
    if layout.sequence_parallel and layout.tp > 1:
        flags.append("--sequence-parallel")
    flags += ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
    flags += _PRECISION.get(precision, [])
    if precision not in _PRECISION:
        notes.append(f"Megatron-LM: no flag for {precision} is known here; its default is fp32")
    if micro_batch:
        flags.append(f"--micro-batch-size {micro_batch}")
        flags += [f"--global-batch-size {micro_batch * num_micro * layout.dp}"] if num_micro else []
    again, more = recompute_flags(layout.recompute, layers, recompute)
    notes += more + _limits(layout, shape, division)
    return {"layout": string, "flags": flags + again, "layers_per_stage": list(layers)}, notes


def recompute_flags(counts: Sequence[int], layers: Sequence[int], base: Recompute) -> tuple[list[str], list[str]]:
    """Flags, and notes where they run more again than the plan does."""
    wanted = [min(count, size) for count, size in zip(counts, layers, strict=True)]
    if base is Recompute.FULL or (any(wanted) and wanted == list(layers)):
        return ["--recompute-granularity full", "--recompute-method uniform", "--recompute-num-layers 1"], []
    if not any(wanted):
        modules = {Recompute.SELECTIVE: "core_attn", Recompute.MOE_ACT: "moe_act layernorm"}.get(base)
        return (["--recompute-granularity selective", f"--recompute-modules {modules}"], []) if modules else ([], [])
    most, notes = max(wanted), []
    if any(count < min(most, size) for count, size in zip(wanted, layers, strict=True)):
        notes.append(
            f"Megatron-LM has one recompute count for all stages: the flags have the largest of the plan's {wanted}"
        )
    if base is not Recompute.NONE:
        notes.append(f"Megatron-LM cannot run whole layers again beside {base}: the flags run whole layers again")
    flags = ["--recompute-granularity full", "--recompute-method block", f"--recompute-num-layers {most}"]
    return flags, notes


def _limits(layout: Layout, shape: ModelShape, division: Division) -> list[str]:
    """What Megatron refuses or lacks."""
    notes = []
    if layout.schedule is ScheduleKind.ZERO_BUBBLE:
        notes.append("Megatron-LM has no zero-bubble schedule in a V: the layout string would run interleaved")
    if layout.dispatch is DispatchMode.REPLICATED and layout.tp > 1:
        notes.append("Megatron-LM trains MoE over tensor ranks with --sequence-parallel only: dispatch R is without")
    divided = [("heads", layer.attention.num_heads, layout.tp) for layer in shape.layers]
    divided += [("experts", layer.ffn.num_experts, division.ep) for layer in shape.layers if layer.ffn.is_moe]
    for what, count, ranks in dict.fromkeys(divided):
        if count % ranks:
            notes.append(f"Megatron-LM wants {what} to divide evenly: {count} over {ranks} ranks do not")
    return notes
