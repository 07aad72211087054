"""What software did to the same hardware, generation by generation: factors on a GPU's laws.

The constants of the catalogue are those of tuned software of 2024 and later. Some published runs are older, or use
plain PyTorch kernels: FlashAttention 1 on H100, matrix products before libraries were tuned for it. Mixtures of experts
are younger still: NVIDIA prints the same recipes release by release, and they differ by up to two times. One factor per
law, generation and GPU generation, each with its origin; nothing per case. The reasons are
guesses from what moved together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from skymoe.plan.hardware.gpu import Gpu
from skymoe.plan.validate.cases import Case
from skymoe.plan.work import Division


@dataclass(frozen=True, kw_only=True)
class Software:
    """Factors on the laws.

    Attributes:
        framework: pattern of the framework's name.
        gpu: pattern of the catalogue's name of the GPU.
        gemm: on matrix products, all precisions.
        attention: on fused attention.
        memory: on streams (norms, activations).
        host: on the host's time to start kernels (CUDA graphs).
        last: release up to which this is so, where the source tells releases apart ("26.02"); "": any.
        mixtures: only for mixtures of experts.
        hidden: dispatch and combine travel behind the computation of another micro-batch.
        passes: streams over the inner width of routed rows, forward and backward together, for biases of experts and
            clamped gates (GPT-OSS) that are not fused.
        owner_s: seconds of a step per rank that owns a part of the optimizer (weights return by one broadcast each).
        origin: where the factors are from.
    """

    framework: str
    gpu: str
    gemm: float = 1.0
    attention: float = 1.0
    memory: float = 1.0
    host: float = 1.0
    last: str = ""
    mixtures: bool = False
    hidden: bool = False
    passes: float = 0.0
    owner_s: float = 0.0
    origin: str


_BRIDGE: Final = r"megatron-bridge"
_UNFUSED: Final = 230.0
"""Chosen on GPT-OSS, the only such model in the tables: what it lacks per 4096 tokens and layer is 6 ms on H100 and 2
to 3 on B200 to GB300, as a stream would. That it is biases and clamps of experts, not attention's sinks, is a guess."""

SOFTWARE: Final[Mapping[str, Software]] = {
    "llm-foundry, PyTorch 2.0 FSDP, A100": Software(
        framework=r"llm-foundry", gpu=r"a100", memory=0.60,
        origin="chosen on mosaic_mpt on A100: streams are not fused",
    ),
    "llm-foundry, PyTorch 2.0 FSDP, H100": Software(
        framework=r"llm-foundry", gpu=r"h100", gemm=0.83, attention=0.36, memory=0.50,
        origin="chosen on mosaic_mpt on H100: kernels of 2023, written for A100",
    ),
    "Megatron-Bridge until 25.11, mixtures on B200, B300": Software(
        framework=_BRIDGE, gpu=r"b[23]00", mixtures=True, last="25.11", memory=0.4, host=1.25, passes=_UNFUSED,
        origin="as the next two",
    ),
    "Megatron-Bridge 26.02, mixtures on B200, B300": Software(
        framework=_BRIDGE, gpu=r"b[23]00", mixtures=True, last="26.02", memory=0.75, host=1.25, passes=_UNFUSED,
        origin="megatron_bridge: with one sequence a layer takes 8 to 15 ms whatever it computes, later less",
    ),
    "Megatron-Bridge until 25.09, mixtures on GB200, GB300": Software(
        framework=_BRIDGE, gpu=r"gb[23]00", mixtures=True, last="25.09", memory=0.4, host=0.25, passes=_UNFUSED,
        origin="megatron_bridge: kernels around experts were fused from release to release",
    ),
    "Megatron-Bridge until 26.04, mixtures on Blackwell": Software(
        framework=_BRIDGE, gpu=r"g?b[23]00", mixtures=True, last="26.04.99", memory=0.75, host=0.25, passes=_UNFUSED,
        origin="megatron_bridge: as above",
    ),
    "Megatron-Bridge 26.06, mixtures on Blackwell": Software(
        framework=_BRIDGE, gpu=r"g?b[23]00", mixtures=True, last="26.07", host=0.25, hidden=True, passes=_UNFUSED,
        origin="megatron_bridge: steps are shorter than in 26.04 by about the time of dispatch and combine",
    ),
    "Megatron-Bridge since 26.08, mixtures on Blackwell": Software(
        framework=_BRIDGE, gpu=r"g?b[23]00", mixtures=True, host=0.25, hidden=True, passes=70.0,
        origin="megatron_bridge: GPT-OSS gained 40 % in this release, Qwen3 nothing",
    ),
    "Megatron-Bridge, mixtures on H100": Software(
        framework=_BRIDGE, gpu=r"h", mixtures=True, host=1.7, passes=_UNFUSED,
        origin="megatron_bridge: with one sequence a layer takes 12 to 17 ms in all releases",
    ),
    "NeMo, mixtures on H100": Software(
        framework=r"nemo", gpu=r"h", mixtures=True, memory=0.4,
        origin="dgxc: Grok-1 and DeepSeek-V3 of 2024 and 2025, as Megatron-Bridge's first releases",
    ),
    "Megatron-Bridge on Blackwell": Software(
        framework=r"megatron-bridge", gpu=r"g?b[23]00", host=0.25,
        origin="its recipes for speed there run CUDA graphs; a quarter of the kernels is started by the host (assumed)",
    ),
    "InternEvo": Software(
        framework=r"internevo", gpu=r"a", owner_s=0.0032,
        origin="chosen on internevo with ZeRO-1 over all replicas: every owner broadcasts its weights",
    ),
}  # fmt: skip


def with_habits(case: Case, division: Division) -> Division:
    """`division` as the case's framework runs it by default.

    Megatron-Bridge and NeMo: tensor-parallel communication beside products (Transformer Engine), gradients in bf16 in
    recipes for speed; DeepEP or HybridEP in Bridge's; Adam's moments in bf16 in Bridge's recipes of DeepSeek and
    Moonlight.
    torchtitan with a pipeline keeps weights and gradients whole during a step, fp32 weights divided.
    """
    framework, name = case.text("framework").lower(), case.text("model.name").lower()
    if "bridge" in framework:
        latent = re.search(r"deepseek|moonlight|kimi", name) is not None
        return replace(
            division,
            tensor_overlap=True,
            node_dispatch=True,
            gradient_bytes=2.0,
            optimizer_bytes=8.0 if latent else 12.0,
        )
    if re.match(r"nemo|megatron-core r", framework):  # Megatron-Core r0.8's table says that all communication overlaps
        return replace(division, tensor_overlap=True, gradient_bytes=2.0)
    if framework == "torchtitan" and division.zero_stage == 3 and division.pp > 1:
        return replace(division, zero_stage=1, gradient_bytes=4.0, optimizer_bytes=16.0)  # FSDP2 adds them up in fp32
    if "internevo" in framework:
        return replace(division, gradient_bytes=2.0)
    if framework == "megatron-lm fork":  # Qi et al. 2024 and Yeung et al. 2025: fp16, gradients too: 16 bytes a weight
        return replace(division, gradient_bytes=2.0)
    return division


def on_software(case: Case, gpu: Gpu) -> Gpu:
    """`gpu` with the laws that the case's software reaches."""
    found = software_of(case, gpu)
    if found is None:
        return gpu
    laws = replace(
        gpu.laws, gemm=gpu.laws.gemm * found.gemm, gemm_narrow=gpu.laws.gemm_narrow * found.gemm,
        attention=gpu.laws.attention * found.attention, memory=gpu.laws.memory * found.memory,
        host_s=gpu.laws.host_s * found.host,
    )  # fmt: skip
    return replace(gpu, laws=laws)


def software_of(case: Case, gpu: Gpu) -> Software | None:
    """The generation that the case's framework names, None for today's."""
    name, release = case.text("framework").lower(), _release(case)
    for found in SOFTWARE.values():
        known = re.match(found.framework, name) and re.match(found.gpu, gpu.name)
        fits = not found.last or "" < release <= found.last
        if known and fits and (case.has("model.moe") or not found.mixtures):
            return found
    return None


def _release(case: Case) -> str:
    """As NVIDIA's tables print it ("26.02.01"), "" where there is none."""
    found = re.search(r"release \"(\d\d\.\d\d(?:\.\d\d)?)\b", case.text("source"))
    return found[1] if found else ""
