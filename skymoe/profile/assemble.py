"""From what a rank has found to the file's fields."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from skymoe.plan.hardware.gpu import Precision
from skymoe.plan.hardware.profile import (
    Gemm,
    Law,
    LayerKind,
    LinkKind,
    MachineFacts,
    ModelFacts,
    ModelTimes,
    Piece,
    Profile,
)  # fmt: skip
from skymoe.profile.config import ProfileConfig
from skymoe.profile.fits import fit_gemm
from skymoe.profile.layers import kinds_of, task_name
from skymoe.profile.machine import gemm_points
from skymoe.profile.timing import Timed
from skymoe.profile.worker import Found
from skymoe.spec.model import ModelSpec


def assemble(config: ProfileConfig, spec: ModelSpec, found: Found, load: float) -> Profile:
    """The profile. Fits the GEMM law."""
    precision = Precision(config.precision)
    seconds = [found.times[f"gemm.{number}"].forward_s for number in range(len(found.sizes))]
    law = fit_gemm(gemm_points(found.sizes, [max(t, 1e-9) for t in seconds], int(precision.weight_bytes)))
    gemms = tuple(
        Gemm(m=m, k=k, n=n, seconds=seconds[number], spread=found.times[f"gemm.{number}"].spread)
        for number, (m, k, n) in enumerate(found.sizes)
    )
    fitted = Law(rate=law.rate, bandwidth=law.bandwidth, launch_s=law.launch_s, error=law.error)
    return Profile(
        format="skymoe-profile",
        version=1,
        machine=_machine(config, found, load),
        gemm={precision: gemms},
        law={precision: fitted},
        stream=found.stream_bytes / found.times["stream"].forward_s,
        links={LinkKind(kind): fit for kind, fit in found.links.items()},
        update_s=found.times["update"].forward_s / found.updated,
        times=_times(config, spec, found, precision),
    )


def _machine(config: ProfileConfig, found: Found, load: float) -> MachineFacts:
    return MachineFacts(
        device=config.device, title=found.title, memory=found.memory, ranks=config.ranks, threads=config.threads,
        torch=torch.__version__, load=load, clock="thread" if found.is_thread_clock else "wall",
    )  # fmt: skip


def _times(config: ProfileConfig, spec: ModelSpec, found: Found, precision: Precision) -> ModelTimes:
    def kind(is_moe: bool) -> LayerKind:
        attention, feed_forward, layer = (
            _piece(found.times, found.kept, task_name(is_moe, piece, False), task_name(is_moe, piece, True))
            for piece in ("attention", "feed_forward", "layer")
        )
        return LayerKind(is_moe=is_moe, attention=attention, feed_forward=feed_forward, layer=layer)

    return ModelTimes(
        model=_model(config, spec), sequence_length=config.tokens, micro_batch=config.micro_batch, precision=precision,
        kinds=tuple(kind(is_moe) for is_moe in kinds_of(spec, config.layers)),
        embedding=_piece(found.times, found.kept, "embedding"), head=_piece(found.times, found.kept, "head"),
    )  # fmt: skip


def _piece(times: Mapping[str, Timed], kept: Mapping[str, float], name: str, again: str = "") -> Piece:
    plain = times[name]
    figures = {"forward_s": plain.forward_s, "backward_s": plain.backward_s, "kept": kept[name]}
    if again:
        run_again = times[again]
        figures |= {"again_forward_s": run_again.forward_s, "again_backward_s": run_again.backward_s}
        figures |= {"kept_again": kept[again]}
    return Piece(**figures, spread=plain.spread)


def _model(config: ProfileConfig, spec: ModelSpec) -> ModelFacts:
    moe = spec.moe
    return ModelFacts(
        name=config.model[-200:], hidden_size=spec.hidden_size, vocab_size=spec.vocab_size, num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim, ffn_size=spec.ffn_size,
        num_experts=moe.num_experts if moe else 0, top_k=moe.top_k if moe else 0,
        expert_size=moe.ffn_size if moe else 0, shared_size=moe.shared_ffn_size if moe else 0, weights="random",
    )  # fmt: skip
