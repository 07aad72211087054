"""One plan, in every program's words.

`plan_file` is exact: `skymoe train` replays it. The others take whole layers and one recompute setting for all stages;
whatever is lost on the way stands in `notes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skymoe.base.errors import ConfigError
from skymoe.plan.emit.megatron import megatron
from skymoe.plan.emit.others import deepspeed, torchtitan, vllm
from skymoe.plan.emit.whole import is_whole, whole_layers
from skymoe.plan.hardware.gpu import Precision
from skymoe.plan.shape import ModelShape
from skymoe.plan.work import Recompute
from skymoe.spec.layout import Layout
from skymoe.spec.plan_file import Plan, plan_fields


def emit(
    layout: Layout,
    shape: ModelShape,
    *,
    recompute: Recompute = Recompute.NONE,
    micro_batch: int | None = None,
    num_micro: int | None = None,
    precision: Precision = Precision.BF16,
    expected: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Plain data, ready for JSON: `plan_file`, `megatron`, `torchtitan`, `deepspeed`, `vllm`, `notes`.

    Args:
        layout: the division, the split and the layers that are run again whole.
        shape: of the model.
        recompute: what of every layer is run again beside.
        micro_batch, num_micro: sequences, and micro-batches of a step and replica.
        precision: of the matrix products.
        expected: what is foretold, carried along in the plan file.

    Raises:
        ConfigError: the stages are not those of the model.
    """
    if layout.stages.num_units != 2 * shape.num_layers:
        raise ConfigError(
            f"the stages hold {layout.stages.num_units / 2:g} layers, {shape.name} has {shape.num_layers}"
        )
    found: dict[str, Any] = {"plan_file": plan_fields(Plan(shape.num_layers, layout, expected or {}))}
    notes = []
    if recompute is not Recompute.NONE:
        notes.append(f"plan file: it has no word for {recompute} recomputation, only for whole layers")
    found["megatron"], more = megatron(
        layout, shape, recompute=recompute, micro_batch=micro_batch, num_micro=num_micro, precision=precision
    )
    notes += more
    layers = whole_layers(layout.stages)
    found |= dict.fromkeys(("torchtitan", "deepspeed", "vllm"))
    if layers is None:
        return found | {"notes": [*notes, "torchtitan, DeepSpeed, vLLM: they do not cut layers either"]}
    if not is_whole(layout.stages):
        notes.append(f"torchtitan, DeepSpeed, vLLM: cuts within layers rounded to {list(layers)} layers")
    found["torchtitan"], of_titan = torchtitan(
        layout, layers, recompute=recompute, is_moe=any(layer.ffn.is_moe for layer in shape.layers)
    )
    found["deepspeed"], of_deepspeed = deepspeed(layers)
    found["vllm"], of_vllm = vllm(layout, layers)
    return found | {"notes": [*notes, *of_titan, *of_deepspeed, *of_vllm]}
