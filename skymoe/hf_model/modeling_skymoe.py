# Copyright 2026 The skymoe authors. Licensed under the Apache License, Version 2.0.
"""SkyMoE for transformers (`trust_remote_code=True`): Qwen2-MoE's decoder with a normalized gate.

Written by skymoe beside the weights; needs transformers >= 5 only. Experts are separate modules with the tensor names
of the files, so no tool has to convert them. Two rules for whoever changes this: the router's first result must be
the *normalized* logits (the balance loss takes the softmax of it), and the router keeps a buffer besides `weight`:
engines that fuse routers recognize them by their tensors, and would otherwise rebuild this one without the
normalization.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_moe.modeling_qwen2_moe import (
    Qwen2MoeAttention,
    Qwen2MoeDecoderLayer,
    Qwen2MoeForCausalLM,
    Qwen2MoeMLP,
    Qwen2MoeModel,
    Qwen2MoePreTrainedModel,
    Qwen2MoeRMSNorm,
    Qwen2MoeRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils.output_capturing import OutputRecorder

from .configuration_skymoe import SkyMoeConfig


class SkyMoeRouter(nn.Module):
    """z = W x; z~ = scale (z - mean) / (std + eps); softmax; top-k; renormalize. In fp32."""

    def __init__(self, config: SkyMoeConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_local_experts, config.hidden_size))
        # Never read: it makes this router unlike a plain linear one (see the module docstring).
        self.register_buffer("norm_scale", torch.tensor(float(config.gate_norm_scale)), persistent=False)
        if config.expert_bias:
            self.register_buffer("e_score_correction_bias", torch.zeros(config.num_local_experts))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        config = self.config
        logits = F.linear(hidden_states.reshape(-1, config.hidden_size).float(), self.weight.float())
        if config.gate_norm:
            spread = logits.std(-1, correction=config.gate_norm_ddof, keepdim=True) + config.gate_norm_eps
            centred = logits - logits.mean(-1, keepdim=True) if config.gate_norm_subtract_mean else logits
            logits = config.gate_norm_scale * centred / spread
        probs = logits.softmax(-1)
        scores = logits if config.gate_norm else probs
        if config.expert_bias:
            scores = scores + self.e_score_correction_bias
        ids = scores.topk(config.num_experts_per_tok, dim=-1).indices
        weights = probs.gather(-1, ids)
        if config.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights, ids


class SkyMoeMLP(Qwen2MoeMLP):
    """SwiGLU, with biases where the model has them."""

    def __init__(self, config: SkyMoeConfig, intermediate_size: int, bias: bool = False):
        super().__init__(config, intermediate_size=intermediate_size)
        if bias:
            self.gate_proj = nn.Linear(self.hidden_size, intermediate_size)
            self.up_proj = nn.Linear(self.hidden_size, intermediate_size)
            self.down_proj = nn.Linear(intermediate_size, self.hidden_size)


class SkyMoeExperts(nn.ModuleList):
    """All routed experts; `forward` is what engines replace by a fused kernel."""

    def __init__(self, config: SkyMoeConfig):
        super().__init__(SkyMoeMLP(config, config.moe_intermediate_size) for _ in range(config.num_local_experts))

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor):
        output = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self):
            tokens, places = torch.where(top_k_index == index)
            if tokens.numel():
                result = expert(hidden_states[tokens]) * top_k_weights[tokens, places, None]
                output.index_add_(0, tokens, result.to(output.dtype))
        return output


class SkyMoeSparseMoeBlock(nn.Module):
    """Router, experts, and the shared expert where there is one."""

    def __init__(self, config: SkyMoeConfig):
        super().__init__()
        self.gate = SkyMoeRouter(config)
        self.experts = SkyMoeExperts(config)
        self.shared_expert = None
        if config.shared_expert_intermediate_size:
            self.shared_expert = SkyMoeMLP(config, config.shared_expert_intermediate_size)
            self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, ids = self.gate(flat)
        output = self.experts(flat, ids, weights)
        if self.shared_expert is not None:
            output = output + F.sigmoid(self.shared_expert_gate(flat)) * self.shared_expert(flat)
        return output.reshape(hidden_states.shape)


class SkyMoeAttention(Qwen2MoeAttention):
    """Qwen2-MoE's attention with optional q/k norm and output bias, and the window passed to the kernel."""

    def __init__(self, config: SkyMoeConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None
        if config.o_bias:
            self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size)
        widths = {"head": 1, "full": config.num_attention_heads}, {"head": 1, "full": config.num_key_value_heads}
        self.q_norm, self.k_norm = (
            Qwen2MoeRMSNorm(heads[config.qk_norm] * self.head_dim, eps=config.rms_norm_eps)
            if config.qk_norm
            else nn.Identity()
            for heads in widths
        )

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        input_shape = hidden_states.shape[:-1]
        heads = (*input_shape, -1, self.head_dim)
        query, key = self.q_proj(hidden_states), self.k_proj(hidden_states)
        if self.config.qk_norm == "full":
            query, key = self.q_norm(query).view(heads), self.k_norm(key).view(heads)
        else:
            query, key = self.q_norm(query.view(heads)), self.k_norm(key.view(heads))
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=0.0 if not self.training else self.attention_dropout,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(*input_shape, -1).contiguous()), weights


class SkyMoeDecoderLayer(Qwen2MoeDecoderLayer):
    """One layer, dense or mixture."""

    def __init__(self, config: SkyMoeConfig, layer_idx: int):
        super(Qwen2MoeDecoderLayer, self).__init__()  # Qwen's own would build its experts first
        self.hidden_size = config.hidden_size
        self.self_attn = SkyMoeAttention(config, layer_idx)
        if config.is_moe_layer(layer_idx):
            self.mlp = SkyMoeSparseMoeBlock(config)
        else:
            self.mlp = SkyMoeMLP(config, config.intermediate_size, config.mlp_bias)
        self.input_layernorm = Qwen2MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen2MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class SkyMoePreTrainedModel(Qwen2MoePreTrainedModel):
    """What the two models share."""

    config_class = SkyMoeConfig
    config: SkyMoeConfig
    _no_split_modules = ["SkyMoeDecoderLayer"]
    _supports_attention_backend = True
    _can_record_outputs = {
        "router_logits": OutputRecorder(SkyMoeRouter, index=0),
        "hidden_states": SkyMoeDecoderLayer,
        "attentions": SkyMoeAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, SkyMoeRouter):
            nn.init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            nn.init.constant_(module.norm_scale, self.config.gate_norm_scale)


class SkyMoeModel(SkyMoePreTrainedModel, Qwen2MoeModel):
    """Embedding, layers, norm."""

    def __init__(self, config: SkyMoeConfig):
        Qwen2MoePreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(SkyMoeDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = Qwen2MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen2MoeRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        **kwargs,
    ):
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if not isinstance(attention_mask, dict):  # Qwen2-MoE builds the window's mask even where there is no window
            inputs = {
                "config": self.config,
                "inputs_embeds": inputs_embeds,
                "attention_mask": attention_mask,
                "past_key_values": past_key_values,
                "position_ids": position_ids,
            }
            attention_mask = {"full_attention": create_causal_mask(**inputs)}
            if "sliding_attention" in self.config.layer_types:
                attention_mask["sliding_attention"] = create_sliding_window_causal_mask(**inputs)
        return Qwen2MoeModel.forward(
            self,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )


class SkyMoeForCausalLM(SkyMoePreTrainedModel, Qwen2MoeForCausalLM):
    """The model with its head."""

    def __init__(self, config: SkyMoeConfig):
        Qwen2MoePreTrainedModel.__init__(self, config)
        self.model = SkyMoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts = config.num_local_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.post_init()


__all__ = ["SkyMoeForCausalLM", "SkyMoeModel", "SkyMoePreTrainedModel"]
