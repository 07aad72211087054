"""What a token of the mixture of experts costs, over one of its dense parent: counted where the model is known."""

from __future__ import annotations

from dataclasses import replace

from skymoe.base.errors import ConfigError
from skymoe.plan.guide.config import GuideConfig
from skymoe.plan.guide.facts import COMPUTE_RATIO, HOURS
from skymoe.plan.guide.result import Compute
from skymoe.plan.train.model import MOST_SEQUENCE
from skymoe.spec.flops import count_parameters, flops_per_token
from skymoe.spec.model import ModelSpec, MoESpec
from skymoe.spec.named import read_model


def compute_of(config: GuideConfig) -> Compute:
    """The ratio, by count or by the report's 1.7. Raises ConfigError, FormatError."""
    if config.model is None:
        return Compute(ratio=COMPUTE_RATIO, origin=f"a top-2 model of the {HOURS.source}; give model for a count")
    dense, moe = parent_and_child(config)
    length = config.sequence_length or min(moe.max_position, MOST_SEQUENCE)
    flops = [flops_per_token(spec, length, backward=True).total for spec in (dense, moe)]
    count = count_parameters(moe)
    return Compute(
        ratio=flops[1] / flops[0],
        origin=f"counted against the same model with dense feed-forwards of {dense.ffn_size}: training FLOPs per "
        f"token, causal attention, sequences of {length}",
        dense_flops=flops[0], moe_flops=flops[1], dense_parameters=count_parameters(dense).total,
        moe_parameters=count.total, active_parameters=count.active,
    )  # fmt: skip


def parent_and_child(config: GuideConfig) -> tuple[ModelSpec, ModelSpec]:
    """The dense model and the mixture; one is given, the other has the same everything but the feed-forward.

    Raises:
        ConfigError: a dense model without `experts`, a mixture with them, or a mixture without a dense width.
    """
    assert config.model is not None
    spec = read_model(config.model)
    if spec.moe is None:
        if config.experts is None:
            raise ConfigError(
                f"{config.model} is dense: how many experts shall it get?",
                where="experts",
                hint="--experts 16 --top-k 2",
            )
        top_k = config.top_k or 2
        return spec, replace(spec, moe=MoESpec(num_experts=config.experts, top_k=top_k, ffn_size=spec.ffn_size))
    if config.experts is not None or config.top_k is not None:
        raise ConfigError(
            f"{config.model} has experts already: {spec.moe.num_experts}, top-{spec.moe.top_k}", where="experts",
            hint="leave --experts and --top-k out, or give the dense model",
        )  # fmt: skip
    if spec.ffn_size < 1:
        raise ConfigError(f"{config.model} does not say how wide its dense feed-forward was", where="model")
    return replace(spec, moe=None, moe_layers=None), spec
