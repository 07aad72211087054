# Copyright 2026 The skymoe authors. Licensed under the Apache License, Version 2.0.
"""SkyMoE's configuration, for `trust_remote_code=True`. Written by skymoe beside the weights; needs transformers."""

from __future__ import annotations

from transformers import PreTrainedConfig


class SkyMoeConfig(PreTrainedConfig):
    """A decoder whose layers are dense or mixtures of experts, with optional gating logit normalization.

    Skywork-MoE (arXiv 2406.06563), Eq. 6: the router's logits z of each token become
    `gate_norm_scale * (z - mean(z)) / (std(z) + gate_norm_eps)` before the softmax, `std` with `gate_norm_ddof`.
    `moe_layers` lists the mixture layers; None means all of them. `qk_norm` is `head` (one RMSNorm for each head of the
    queries and keys), `full` (over all heads together) or None.
    """

    model_type = "skymoe"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"num_experts": "num_local_experts"}
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
        "layers.*.mlp.experts.*.gate_proj": "colwise",
        "layers.*.mlp.experts.*.up_proj": "colwise",
        "layers.*.mlp.experts.*.down_proj": "rowwise",
    }

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_dropout: float = 0.0
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str | None = None
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    num_local_experts: int = 0
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 11008
    shared_expert_intermediate_size: int = 0
    norm_topk_prob: bool = True
    expert_bias: bool = False
    moe_layers: list[int] | None = None
    gate_norm: bool = False
    gate_norm_scale: float = 1.0
    gate_norm_ddof: int = 1
    gate_norm_eps: float = 1e-6
    gate_norm_subtract_mean: bool = True
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.layer_types is None:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        self._adapt_tp_plan()
        super().__post_init__(**kwargs)

    def _adapt_tp_plan(self):
        if self.shared_expert_intermediate_size:
            # Engines that reduce the experts' sum over the ranks do so after the shared expert was added to it: split
            # or not, it would count once per rank. So there is no plan, and such models are not split.
            self.base_model_tp_plan = None
        elif self.qk_norm == "full":  # the norm sees all heads, so the ranks gather them first, as for OLMoE
            plan = {f"layers.*.self_attn.{name}_proj": "colwise_gather_output" for name in "qkv"}
            plan["layers.*.self_attn.o_proj"] = "rowwise_split_input"
            self.base_model_tp_plan = self.base_model_tp_plan | plan

    def is_moe_layer(self, layer: int) -> bool:
        """Whether `layer` is a mixture of experts."""
        return self.num_local_experts > 0 and (self.moe_layers is None or layer in self.moe_layers)


__all__ = ["SkyMoeConfig"]
