from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from skymoe.model.init import initialize
from skymoe.model.transformer import Transformer
from skymoe.ops.experts import ExpertsBackend
from skymoe.spec.model import Architecture, GateNormSpec, ModelSpec, MoESpec, QkNorm

Make = Callable[..., Transformer]


def make_spec(**changes: Any) -> ModelSpec:
    """Three layers of odd widths, grouped-query attention; dense unless `moe` says otherwise."""
    options: dict[str, Any] = {
        "architecture": Architecture.SKYMOE,
        "vocab_size": 37,
        "hidden_size": 20,
        "num_layers": 3,
        "ffn_size": 28,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 4,
        "max_position": 64,
        "init_std": 0.3,
    }
    return ModelSpec(**{**options, **changes})


@pytest.fixture
def spec() -> Callable[..., ModelSpec]:
    return make_spec


@pytest.fixture
def make() -> Make:
    """A model from changes to the spec, with weights large enough that everything matters."""

    def build(
        *,
        seed: int = 0,
        experts: ExpertsBackend = ExpertsBackend.GROUPED,
        dtype: torch.dtype | None = None,
        **changes: Any,
    ) -> Transformer:
        model = initialize(Transformer(make_spec(**changes), experts=experts), seed)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or "norm" in name:
                    parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        return model.to(dtype) if dtype else model

    return build


MOE = MoESpec(num_experts=5, top_k=2, ffn_size=12, gate_norm=GateNormSpec())


@pytest.fixture
def moe() -> MoESpec:
    return MOE


# What a layer can be made of, each somewhere in a model of three layers.
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense, tied, biases, q/k norm": {
        "tie_embeddings": True,
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "qk_norm": QkNorm.HEAD,
    },
    "moe": {"moe": MOE},
    "moe, released gate": {
        "moe": MoESpec(
            num_experts=4, top_k=1, ffn_size=7, gate_norm=GateNormSpec(eps=0.0, subtract_mean=False), norm_topk=False
        )
    },
    "dense and moe, window, shared expert": {
        "moe": MoESpec(num_experts=3, top_k=2, ffn_size=8, shared_ffn_size=9, expert_bias=True),
        "moe_layers": (0, 2),
        "sliding_window": 3,
        "sliding_layers": (0, 2),
    },
    "moe, q/k norm over all heads": {"moe": MOE, "qk_norm": QkNorm.FULL},
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def variant(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param
