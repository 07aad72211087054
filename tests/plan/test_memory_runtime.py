"""What a program keeps: our layers against the tensors that autograd saves; frameworks by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from skymoe.model.batch import BatchInfo
from skymoe.model.block import Block
from skymoe.model.inputs import attention_inputs
from skymoe.ops.experts import ExpertsBackend
from skymoe.plan.hardware.catalogue import cluster_of
from skymoe.plan.hardware.gpu import Precision
from skymoe.plan.memory.model import sizes
from skymoe.plan.memory.runtime import MEGATRON, PLAIN, SKYMOE
from skymoe.plan.shape import shape_of
from skymoe.plan.work import Division, Work
from skymoe.spec.model import ModelSpec, MoESpec
from skymoe.spec.presets import preset


def saved_bytes(spec: ModelSpec, num_tokens: int) -> int:
    """Of all tensors that autograd keeps of one layer, its weights and the rotary tables aside."""
    block = Block(spec, 0, ExpertsBackend.GROUPED)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    inputs = attention_inputs(spec, num_tokens, BatchInfo(), None, torch.device("cpu"))
    shared = {tensor.untyped_storage().data_ptr() for tensor in (*block.parameters(), inputs.cos, inputs.sin)}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(torch.randn(1, num_tokens, spec.hidden_size, requires_grad=True), inputs, BatchInfo())
    return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in shared)


@pytest.mark.parametrize("moe", [None, MoESpec(num_experts=4, top_k=2, ffn_size=256)])
def test_our_layers_keep_what_the_model_says(moe: MoESpec | None) -> None:
    """fp32; what is left out are tensors of a few numbers a token (chosen ids and their weights)."""
    spec = replace(preset("demo-dense"), moe=moe)
    work = Work(
        shape=shape_of(spec), division=Division(pp=1, dp=1, tp=1), cluster=cluster_of("a100-80g", 1),
        sequence_length=512, micro_batch=1, num_micro=1, precision=Precision.FP32,
    )  # fmt: skip
    halves = sizes(work, runtime=SKYMOE).halves
    predicted, found = halves[0].activation + halves[1].activation, saved_bytes(spec, 512)
    assert predicted == found if moe is None else predicted == pytest.approx(found, rel=0.01)


def test_plain_modules_keep_more_than_fused_ones() -> None:
    """silu(gate) of a dense feed-forward: one more tensor of inner width; outputs of experts: a row each."""
    for name, more in (("skywork-13b", 12288), ("skywork-moe", 2 * 4608)):
        work = Work(
            shape=shape_of(preset(name)), division=Division(pp=1, dp=1, tp=1), cluster=cluster_of("a100-80g", 1),
            sequence_length=128, micro_batch=1, num_micro=1,
        )  # fmt: skip
        kept = [sizes(work, runtime=runtime).halves[1].activation for runtime in (PLAIN, MEGATRON)]
        assert kept[0] - kept[1] == 128 * 2 * more
