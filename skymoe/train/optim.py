"""AdamW over three groups of parameters, its state as plain named tensors.

    matrices    weight decay                                attention, experts, embedding, head
    routers     their own rate and decay (default none)     under gate normalization only a router's direction
                                                            matters: decay would shrink a scale-free weight and so raise
                                                            its effective rate, silently
    vectors     no decay                                    norms and biases

torch's fused kernel does the update: one pass over weights, gradients and moments. Its state is kept by parameter name
(`layers.0.attention.q.weight/exp_avg`), not by position, so that a checkpoint can be read by any layout and by eye.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from skymoe.base.errors import CheckpointError
from skymoe.train.config import OptimizerConfig

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig
) -> list[dict[str, object]]:
    """The groups as torch takes them; `lr_ratio` is our own key."""
    routers: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in parameters:
        is_router = name.endswith("moe.router.weight")
        (routers if is_router else matrices if parameter.ndim > 1 else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay, "lr_ratio": 1.0},
        {"params": routers, "weight_decay": config.router_weight_decay, "lr_ratio": config.router_lr_ratio},
        {"params": vectors, "weight_decay": 0.0, "lr_ratio": 1.0},
    ]
    return [group for group in groups if group["params"]]


class Optimizer:
    """AdamW with gradient clipping."""

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._clip = config.clip
        groups = parameter_groups(model.named_parameters(), config)
        self._adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """Euclidean norm over all gradients."""
        return nn.utils.get_total_norm(self._gradients())

    @torch.no_grad()
    def update(self, lr: float, grad_norm: float) -> None:
        """Clip by the norm already known, and take one step at the rate `lr`. The gradients are used up."""
        if 0 < self._clip < grad_norm:
            torch._foreach_mul_(self._gradients(), self._clip / grad_norm)
        for group in self._adamw.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        self._adamw.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Forget the gradients of this step."""
        self._adamw.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """The state as named tensors, not copied."""
        state = self._adamw.state
        return {f"{self._names[p]}/{key}": state[p][key] for p in self._names if p in state for key in _MOMENTS}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`.

        Raises:
            CheckpointError: naming tensors that belong to no parameter, or have another shape.
        """
        rest = set(tensors)
        self._adamw.state.clear()
        for parameter, name in self._names.items():
            keys = {key: f"{name}/{key}" for key in _MOMENTS if f"{name}/{key}" in rest}
            if not keys:
                continue  # a parameter that never had a gradient
            if len(keys) < len(_MOMENTS) or tensors[keys["exp_avg"]].shape != parameter.shape:
                raise CheckpointError("the optimizer state does not fit the model", where=name)
            rest -= set(keys.values())
            self._adamw.state[parameter] = {
                key: tensors[full].to(parameter.device, copy=True) for key, full in keys.items()
            }
        if rest:
            raise CheckpointError(
                "optimizer state of parameters that the model has not", where=", ".join(sorted(rest)[:5])
            )

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._names if parameter.grad is not None]
