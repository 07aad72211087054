"""A stage of the pipeline on one rank: some halves of some layers, each with this rank's share of the weights.

The modules are those of the one-device model, made in the sizes that this rank owns; what is new is only how tokens
enter and leave them (`parallel.tokens`), and who dispatches. Parameters have the names of the whole model
(`layers.5.attention.q.weight`) and the shapes of `weights.slices.owned_slices`, which a check at the end enforces:
modules and checkpoints cannot drift apart.

Shapes: B sequences, T tokens each, N = B T, D model; x_ND has this rank's rows only (all of them in mode R).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor, nn

from skymoe.model.batch import BatchInfo
from skymoe.model.inputs import AttentionInputs, attention_inputs
from skymoe.model.linear import Embedding, Linear, RMSNorm
from skymoe.model.mlp import SwiGLU
from skymoe.model.moe import Experts, Router
from skymoe.model.recompute import recompute_layer
from skymoe.ops.routing import Routing
from skymoe.parallel.mesh import Mesh
from skymoe.parallel.options import PartOptions
from skymoe.parallel.sharded import sharded_attention, sharded_swiglu
from skymoe.parallel.sharded_moe import ShardedMoE
from skymoe.parallel.tokens import Tokens
from skymoe.parallel.vocabulary import vocabulary_cross_entropy, vocabulary_embedding
from skymoe.spec.layout import Half
from skymoe.spec.model import ModelSpec
from skymoe.weights.slices import owned_slices

OnRouting = Callable[[int, Tensor, Routing], Tensor]


class ShardedLayer(nn.Module):
    """One layer, or the half of it that this stage has."""

    def __init__(self, spec: ModelSpec, mesh: Mesh, layer: int, halves: Collection[Half], options: PartOptions) -> None:
        super().__init__()
        self.tokens = Tokens.of(mesh, options.num_tokens)
        if Half(layer, True) in halves:
            self.attention_norm = RMSNorm(spec.hidden_size, spec.norm_eps)
            self.attention = sharded_attention(spec, mesh, layer)
        self.has_attention = Half(layer, True) in halves
        self.has_feed_forward = Half(layer, False) in halves
        self.moe: ShardedMoE | None = None
        self.mlp: SwiGLU | None = None
        if self.has_feed_forward:
            self.ffn_norm = RMSNorm(spec.hidden_size, spec.norm_eps)
            if spec.is_moe_layer(layer):
                self.moe = ShardedMoE(spec, mesh, self.tokens, options)
            else:
                self.mlp = sharded_swiglu(spec.hidden_size, spec.ffn_size, mesh, bias=spec.mlp_bias)

    def forward(self, x_ND: Tensor, inputs: AttentionInputs, batch: BatchInfo) -> tuple[Tensor, Routing | None]:
        routing = None
        if self.has_attention:
            a_ND = self.tokens.enter(self.attention_norm(x_ND))
            a_BTD = a_ND.view(-1, inputs.cos.shape[-2], a_ND.shape[-1])
            x_ND = x_ND + self.tokens.leave(self.attention(a_BTD, inputs).flatten(0, 1))
        if self.moe is not None:
            y_ND, routing = self.moe(self.ffn_norm(x_ND), batch)
            x_ND = x_ND + y_ND
        elif self.mlp is not None:
            x_ND = x_ND + self.tokens.leave(self.mlp(self.tokens.enter(self.ffn_norm(x_ND))))
        return x_ND, routing


class Part(nn.Module):
    """What one rank has of one stage. Uninitialised, as the model's modules are.

    Attributes:
        stage: its number.
        slices: what it has of each tensor.
    """

    def __init__(self, spec: ModelSpec, mesh: Mesh, stage: int, options: PartOptions) -> None:
        super().__init__()
        layout = mesh.layout
        self.spec, self.stage, self._mesh = spec, stage, mesh
        self.is_first, self.is_last = stage == 0, stage == layout.num_stages - 1
        self.tokens = Tokens.of(mesh, options.num_tokens)
        self.slices = owned_slices(spec, layout, mesh.coordinate, stage)
        self.vocabulary = layout.vocabulary(spec)
        rows, dim = self.vocabulary.sizes[mesh.coordinate.tp], spec.hidden_size
        if "embed.weight" in self.slices:
            self.embed = Embedding(rows, dim)
        halves = layout.halves(stage)
        ids = sorted({half.layer for half in halves})
        self.layers = nn.ModuleDict({str(layer): ShardedLayer(spec, mesh, layer, halves, options) for layer in ids})
        self.recomputed = layout.recomputed_layers(stage)
        if self.is_last:
            self.norm = RMSNorm(dim, spec.norm_eps)
            if not spec.tie_embeddings:
                self.head = Linear(dim, rows)
        _check_shapes(self)

    def forward(
        self,
        x_ND: Tensor | None,
        tokens_BT: Tensor,
        batch: BatchInfo,
        *,
        on_routing: OnRouting | None = None,
        recompute: bool = True,
    ) -> Tensor:
        """Run the stage's layers: hidden states in (None in the first, which looks the tokens up), hidden states out.

        The last stage's norm and head belong to `loss`.

        Args:
            x_ND: what the stage before gave.
            tokens_BT: int64, of the whole micro-batch; every rank of the replica has them.
            batch: of the whole micro-batch.
            on_routing: called after each MoE layer with its global id, the hidden states and the routing of this rank's
                tokens; answers the hidden states to go on with.
            recompute: honour the layout's counts (there is nothing to recompute without a gradient).
        """
        if self.is_first:
            x_ND = self.embedded(tokens_BT)
        assert x_ND is not None
        inputs = attention_inputs(self.spec, tokens_BT.shape[1], batch, None, tokens_BT.device)
        for name, layer in self.layers.items():
            again = recompute and int(name) in self.recomputed and torch.is_grad_enabled()
            run = _recomputing(layer) if again else layer
            x_ND, routing = run(x_ND, inputs, batch)
            if routing is not None and on_routing is not None:
                x_ND = on_routing(int(name), x_ND, routing)
        return x_ND

    def embedded(self, tokens_BT: Tensor) -> Tensor:
        """The table's rows of this rank's tokens, (N, D)."""
        rows = vocabulary_embedding(tokens_BT.flatten(), self.embed.weight, self.vocabulary, self._mesh.tp)
        return self.tokens.leave(rows)

    def routers(self) -> dict[int, Router]:
        """The router of each MoE layer that has its feed-forward here, by the layer's global id."""
        return {layer: moe.router for layer, moe in self._moes()}

    def experts(self) -> dict[int, Experts]:
        """This rank's experts of the same layers."""
        return {layer: moe.experts for layer, moe in self._moes()}

    def _moes(self) -> Iterator[tuple[int, ShardedMoE]]:
        for name, layer in self.layers.items():
            assert isinstance(layer, ShardedLayer)
            if layer.moe is not None:
                yield int(name), layer.moe

    @property
    def head_weight(self) -> Tensor:
        """This rank's rows of the output projection; only the last stage has one."""
        return self.embed.weight if self.spec.tie_embeddings else self.head.weight

    def loss(self, x_ND: Tensor, targets_BT: Tensor) -> Tensor:
        """Final norm, head and cross-entropy in nats summed over the targets, the same on every tp rank."""
        # Each rank's gradient of the normed states is partial; `enter` sums it on the way back.
        whole_ND, targets_N = self.tokens.enter(self.norm(x_ND)), targets_BT.flatten()
        return vocabulary_cross_entropy(
            whole_ND, self.head_weight, targets_N, self.vocabulary, self._mesh.tp, sum_gradient=False
        )


def _recomputing(layer: nn.Module) -> Callable[..., tuple[Tensor, Routing | None]]:
    return lambda *args: recompute_layer(layer, *args)


def _check_shapes(part: Part) -> None:
    """The module has exactly what the table of slices says."""
    found = {name: tuple(tensor.shape) for name, tensor in part.state_dict(keep_vars=True).items()}
    expected = {name: slice_.shape for name, slice_ in part.slices.items()}
    assert found == expected, {k: (found.get(k), expected.get(k)) for k in found.keys() ^ expected.keys()} or [
        (k, found[k], expected[k]) for k in found if found[k] != expected[k]
    ]
