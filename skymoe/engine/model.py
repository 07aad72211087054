"""ServingModel: one rank's part of a forward pass over the tokens of a step.

Tokens of all sequences stand one after another, x_ND; only attention knows where one ends. In every layer a rank
computes its heads' term of the attention and its columns' (or experts') term of the feed-forward, and the ranks sum
what they have, twice a layer; residual stream, norms and routers are the same bits on all of them. A rank that has
no head or no column of a layer adds zeros. The vocabulary is divided for the embedding (a sum) and for the head, whose
logits rank 0 gathers.

Routing, gate normalization included, is `ops.routing`, the code that trains; whether weights are FP8 does not matter
to it. No row depends on what else is in the step: every product is one of `ops.invariant`'s, every sum over ranks
goes element by element.

Shapes: N tokens of the step, D model, H query heads here, G key/value heads here, C head width, E experts, R rows of
logits, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from skymoe.engine.exchange import Exchange
from skymoe.engine.kv_cache import PagedCache
from skymoe.engine.load import AttentionWeights, LayerWeights, MoEWeights, Share, SwiGLUWeights
from skymoe.engine.shares import LayerShare, vocabulary_rows
from skymoe.ops.invariant import by_expert, invariant_linear, sigmoid, swiglu
from skymoe.ops.norm import rms_norm
from skymoe.ops.paged import PagedBatch
from skymoe.ops.permute import gather_tokens, group_by_expert, scatter_tokens
from skymoe.ops.rotary import apply_rotary, inverse_frequencies, rotary_tables
from skymoe.ops.routing import Routing, count_assignments, route
from skymoe.spec.model import ModelSpec, QkNorm
from skymoe.spec.serving_plan import ServingPlan


class ServingModel:
    """The part of the model that `exchange.rank` has.

    Args:
        spec: the model.
        plan: the division.
        share: weights of this rank.
        exchange: the ranks.
        cache: of this rank's key/value heads.

    Attributes:
        expert_tokens_LE: int64, how many tokens each expert got so far, one row per MoE layer.
    """

    def __init__(self, spec: ModelSpec, plan: ServingPlan, share: Share, exchange: Exchange, cache: PagedCache) -> None:
        self.spec, self.share, self.exchange, self.cache = spec, share, exchange, cache
        self.rows = vocabulary_rows(plan)
        device = share.norm.device
        # Dynamic NTK included: within its original context, where division.context_limit keeps it, nothing stretches.
        frequencies, self._factor = inverse_frequencies(spec.rope, spec.head_dim, spec.max_position)
        self._frequencies = frequencies.to(device)
        experts = spec.moe.num_experts if spec.moe else 0
        self.expert_tokens_LE = torch.zeros(len(spec.moe_layer_ids), experts, dtype=torch.int64, device=device)

    @torch.inference_mode()
    def forward(self, tokens_N: Tensor, batch: PagedBatch, logit_rows: Tensor) -> Tensor | None:
        """Run the tokens of a step and extend the cache by them.

        Args:
            tokens_N: int64 token ids, at least one.
            batch: their sequences.
            logit_rows: of which rows the logits are wanted, int64.

        Returns:
            fp32 logits (R, V) on rank 0, None on the others.
        """
        cos, sin = rotary_tables(self._frequencies, self._factor, batch.positions_N[None])
        x_ND = self.exchange.sum(self._embedded(tokens_N))
        moe_layer = 0
        for index, layer in enumerate(self.share.layers):
            x_ND = x_ND + self._attention(index, layer, self._norm(x_ND, layer.attention_norm), cos, sin, batch)
            h_ND = self._norm(x_ND, layer.ffn_norm)
            if layer.moe is None:
                term_ND = _swiglu(h_ND, layer.mlp) if layer.mlp else torch.zeros_like(h_ND)
            else:
                routing = self._route(h_ND, layer.moe)
                self.expert_tokens_LE[moe_layer] += routing.counts_E
                moe_layer += 1
                term_ND = _moe(h_ND, layer.moe, layer.share, routing)
            x_ND = x_ND + _biased(self.exchange.sum(term_ND), layer.down_bias)
        return self._logits(self._norm(x_ND[logit_rows], self.share.norm))

    def _norm(self, x_ND: Tensor, weight_D: Tensor) -> Tensor:
        return rms_norm(x_ND, weight_D, self.spec.norm_eps)

    def _embedded(self, tokens_N: Tensor) -> Tensor:
        """Rows of the table that are here, zeros for the others."""
        here = self.rows.part(self.exchange.rank)
        if not here:
            return self.share.embed_VD.new_zeros(len(tokens_N), self.spec.hidden_size)
        mine_N = (tokens_N >= here.start) & (tokens_N < here.stop)
        index_N = (tokens_N - here.start).masked_fill(~mine_N, 0)
        return F.embedding(index_N, self.share.embed_VD).masked_fill(~mine_N[:, None], 0)

    def _logits(self, x_RD: Tensor) -> Tensor | None:
        if not len(x_RD):
            return x_RD.new_empty(0, self.spec.vocab_size, dtype=torch.float32) if self.exchange.rank == 0 else None
        here = self.rows.part(self.exchange.rank)
        logits_RV = self.share.head(x_RD) if here else x_RD.new_empty(len(x_RD), 0)
        return self.exchange.gather_columns(logits_RV.float(), self.rows)

    # ---- attention

    def _attention(
        self, index: int, layer: LayerWeights, x_ND: Tensor, cos: Tensor, sin: Tensor, batch: PagedBatch
    ) -> Tensor:
        spec, share, weights = self.spec, layer.share, layer.attention
        sizes = [len(share.heads), len(share.kv_heads), len(share.kv_heads)]
        qkv = weights.qkv(x_ND, weights.qkv_bias) if weights else x_ND.new_empty(len(x_ND), 0)
        q_NHC, k_NGC, v_NGC = (
            part.unflatten(1, (-1, spec.head_dim)) if part.shape[1] else part.unflatten(1, (0, spec.head_dim))
            for part in qkv.split([size * spec.head_dim for size in sizes], 1)
        )
        q_NHC, k_NGC = self._qk_normed(q_NHC, k_NGC, weights, share)
        if weights is None:
            return _biased(self.exchange.sum(torch.zeros_like(x_ND)), layer.o_bias)
        q_NHC, k_NGC = (apply_rotary(x.transpose(0, 1)[None], cos, sin)[0].transpose(0, 1) for x in (q_NHC, k_NGC))
        self.cache.write(index, k_NGC, v_NGC, batch.slots_N)
        group = spec.num_heads // spec.num_kv_heads
        kv_of_head = [head // group - share.kv_heads.start for head in share.heads]
        out_NHC = self.cache.attend(index, q_NHC, batch, kv_of_head=kv_of_head, window=spec.window(index))
        return _biased(self.exchange.sum(weights.o(out_NHC.flatten(1))), layer.o_bias)

    def _qk_normed(
        self, q_NHC: Tensor, k_NGC: Tensor, weights: AttentionWeights | None, share: LayerShare
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys after the norm of the spec."""
        if self.spec.qk_norm is QkNorm.FULL:
            return self._normed_over_ranks(q_NHC, k_NGC, weights, share)
        if weights is None or weights.q_norm is None or weights.k_norm is None:
            return q_NHC, k_NGC
        return self._norm(q_NHC, weights.q_norm), self._norm(k_NGC, weights.k_norm)

    def _normed_over_ranks(
        self, q_NHC: Tensor, k_NGC: Tensor, weights: AttentionWeights | None, share: LayerShare
    ) -> tuple[Tensor, Tensor]:
        """A norm over the heads of all ranks: each tells the squares of its own, a shared key head counts once."""
        squares_N2 = torch.stack([x.float().square().sum((1, 2)) for x in (q_NHC, k_NGC)], 1)
        if not share.holds_first:
            squares_N2[:, 1] = 0
        spec = self.spec
        widths = squares_N2.new_tensor([spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim])
        scale_N2 = (self.exchange.sum(squares_N2) / widths + spec.norm_eps).rsqrt()
        if weights is None:
            return q_NHC, k_NGC
        assert weights.q_norm is not None and weights.k_norm is not None
        q = q_NHC.flatten(1).float() * scale_N2[:, :1] * weights.q_norm.float()
        k = k_NGC.flatten(1).float() * scale_N2[:, 1:] * weights.k_norm.float()
        return q.to(q_NHC.dtype).view_as(q_NHC), k.to(k_NGC.dtype).view_as(k_NGC)

    # ---- mixture of experts

    def _route(self, x_ND: Tensor, weights: MoEWeights) -> Routing:
        """The same on every rank: whole router, fp32."""
        moe = self.spec.moe
        assert moe is not None
        return route(
            invariant_linear(x_ND.float(), weights.router_ED), top_k=moe.top_k, gate_norm=moe.gate_norm,
            norm_topk=moe.norm_topk, expert_bias_E=weights.expert_bias_E,
        )  # fmt: skip


def _biased(x_ND: Tensor, bias_D: Tensor | None) -> Tensor:
    return x_ND if bias_D is None else x_ND + bias_D


def _swiglu(x_ND: Tensor, weights: SwiGLUWeights) -> Tensor:
    return weights.down(swiglu(weights.gate_up(x_ND, weights.gate_up_bias)))


def _moe(x_ND: Tensor, weights: MoEWeights, share: LayerShare, routing: Routing) -> Tensor:
    """This rank's term: its columns of all experts, or all columns of its experts, and of the shared expert."""
    term_ND = _experts(x_ND, weights.experts, _of_experts(routing, share.experts))
    if weights.shared is not None and weights.shared_gate_1D is not None:
        gate_N1 = sigmoid(invariant_linear(x_ND, weights.shared_gate_1D))
        term_ND = term_ND + gate_N1 * _swiglu(x_ND, weights.shared)
    return term_ND


def _experts(x_ND: Tensor, experts: tuple[SwiGLUWeights, ...], routing: Routing) -> Tensor:
    grouping = group_by_expert(routing)
    x_RD = gather_tokens(x_ND, grouping)
    if not experts or not len(x_RD):
        return torch.zeros_like(x_ND)
    counts = routing.sent_counts_E.tolist()
    y_RD = by_expert(x_RD, counts, lambda expert, rows: _swiglu(rows, experts[expert]))
    return scatter_tokens(y_RD, routing.weights_TK, grouping)


def _of_experts(routing: Routing, experts: range) -> Routing:
    """The part of a routing that goes to `experts`, numbered from 0; the rest is sent nowhere."""
    if experts == range(routing.counts_E.numel()):
        return routing
    ids_TK = routing.expert_ids_TK
    mine_TK = (ids_TK >= experts.start) & (ids_TK < experts.stop)
    ids_TK = (ids_TK - experts.start).where(mine_TK, len(experts))
    return routing._replace(
        weights_TK=routing.weights_TK * mine_TK, expert_ids_TK=ids_TK,
        counts_E=count_assignments(ids_TK, len(experts)), is_full=False,
    )  # fmt: skip
