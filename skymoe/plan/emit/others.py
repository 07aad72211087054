"""torchtitan's module lists, DeepSpeed's parts, vLLM's partition.

torchtitan  `parallelism.module_fqns_per_model_part`: names of modules per stage; stage s is on rank s mod PP, in the
            V schedules down and up again. Activation checkpointing is one setting for all stages.
DeepSpeed   `PipelineModule` divides uniformly, by parameters or by a class name; given bounds have no option
            (DeepSpeed issue 2974), so they are for those who override `_partition_layers`.
vLLM        VLLM_PP_LAYER_PARTITION: layers per pipeline rank, one stage each.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from skymoe.plan.work import Division, Recompute
from skymoe.spec.layout import ExpertAxis, Layout, ScheduleKind
from skymoe.spec.split import Split

_SCHEDULES = {
    ScheduleKind.ONE_F_ONE_B: "1F1B",
    ScheduleKind.INTERLEAVED: "Interleaved1F1B",
    ScheduleKind.ZERO_BUBBLE: "ZBVZeroBubble",
}


def torchtitan(
    layout: Layout, layers: Sequence[int], *, recompute: Recompute, is_moe: bool
) -> tuple[dict[str, Any], list[str]]:
    """Settings by their dotted names, and what they do not say."""
    whole = [min(count, size) for count, size in zip(layout.recompute, layers, strict=True)]
    mode, notes = "none", []
    if recompute is Recompute.FULL or any(whole):
        mode = "full"
        if recompute is not Recompute.FULL and whole != list(layers):
            notes.append(f"torchtitan checkpoints all layers or none: the plan runs {whole} of them again")
    elif recompute is not Recompute.NONE:
        mode = "selective"
        notes.append(f"torchtitan's selective checkpointing is not the plan's {recompute}: it saves single operators")
    settings: dict[str, Any] = {
        "parallelism.pipeline_parallel_degree": layout.pp,
        "parallelism.pipeline_parallel_schedule": _SCHEDULES[layout.schedule],
        "parallelism.tensor_parallel_degree": layout.tp,
        "parallelism.data_parallel_shard_degree": layout.dp,
        "parallelism.module_fqns_per_model_part": module_names(layers),
        "activation_checkpoint.mode": mode,
    }
    if is_moe:
        settings["parallelism.expert_parallel_degree"] = Division.of(layout).ep
    if is_moe and layout.expert is ExpertAxis.EDP and layout.tp > 1:
        notes.append("torchtitan divides experts over data-parallel ranks: as many ranks, but other ones")
    notes.append("torchtitan shards weights and gradients over data-parallel ranks as well (FSDP), the plan does not")
    return settings, notes


def module_names(layers: Sequence[int]) -> list[list[str]]:
    """Names per stage, in torchtitan's words for the ends."""
    stages = [[f"layers.{layer}" for layer in part] for part in Split(tuple(layers))]
    stages[0].insert(0, "tok_embeddings")
    stages[-1] += ["norm", "output"]
    return stages


def deepspeed(layers: Sequence[int]) -> tuple[dict[str, Any], list[str]]:
    """Bounds of the stages in the list [embedding, layers.., head]: stage s has [parts[s], parts[s + 1])."""
    bounds = [0, *(stop + 1 for stop in accumulate(layers))]
    bounds[-1] += 1
    return {"parts": bounds}, ["DeepSpeed has no option for given bounds: override PipelineModule._partition_layers"]


def vllm(layout: Layout, layers: Sequence[int]) -> tuple[dict[str, Any] | None, list[str]]:
    """Environment and flags; None with several stages per rank."""
    if layout.num_stages != layout.pp:
        return None, ["vLLM has one stage per rank: a split with several cannot be served"]
    flags = [f"--tensor-parallel-size {layout.tp}", f"--pipeline-parallel-size {layout.pp}"]
    environment = {"VLLM_PP_LAYER_PARTITION": ",".join(map(str, layers))} if layout.pp > 1 else {}
    return {"environment": environment, "flags": flags}, []
