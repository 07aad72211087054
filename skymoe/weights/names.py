"""File names <-> module names, one reversible table per architecture.

On disk an expert's three matrices are three tensors; in memory all experts of a layer are two stacked parameters
(`gate_up`, `down`), so that one grouped matmul runs them. A `Place` says where a file's tensor lives: which
parameter, and which part of it. `tensor_table(spec)` is the whole table of a model, in the order in which files are
written: the reader walks it to prove that nothing is missing and nothing is left over, the writer walks it the other
way.

We write the names of the hub: Mixtral's `block_sparse_moe.experts.E.w1`, Qwen's and OLMoE's
`mlp.experts.E.gate_proj`; every tool reads those. transformers v5 holds experts fused in memory
(`mlp.experts.gate_up_proj`), and some converters have written that to disk; such a directory is recognized and read
(`Layout.FUSED`), never written.

In `model.layers.I`, Mixtral and Skywork-MoE differ from the others in the last four rows:

| module name (after `layers.I.`) | file name                         | Mixtral, Skywork-MoE                  |
|---------------------------------|-----------------------------------|---------------------------------------|
| attention.q.weight              | self_attn.q_proj.weight           | the same                              |
| mlp.gate.weight                 | mlp.gate_proj.weight              | (no dense layers)                     |
| moe.router.weight               | mlp.gate.weight                   | block_sparse_moe.gate.weight          |
| moe.experts.gate_up[E, :F]      | mlp.experts.E.gate_proj.weight    | block_sparse_moe.experts.E.w1.weight  |
| moe.experts.gate_up[E, F:]      | mlp.experts.E.up_proj.weight      | block_sparse_moe.experts.E.w3.weight  |
| moe.experts.down[E]             | mlp.experts.E.down_proj.weight    | block_sparse_moe.experts.E.w2.weight  |

No torch here: a plan needs names and shapes only.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from skymoe.spec.model import Architecture, ModelSpec, QkNorm

Index = tuple[int | slice, ...]


class Layout(StrEnum):
    """How the experts of a layer lie on disk."""

    HUB = "hub"  # three tensors per expert
    FUSED = "fused"  # two stacked tensors per layer, as transformers v5 holds them in memory


@dataclass(frozen=True)
class Place:
    """Where a file's tensor lives in the module.

    Attributes:
        parameter: module name of the parameter (or buffer).
        shape: shape of the file's tensor.
        expert: index into the parameter's first dimension, or None for all of it.
        rows: first and one-past-last row within that expert, or None for all rows.
    """

    parameter: str
    shape: tuple[int, ...]
    expert: int | None = None
    rows: tuple[int, int] | None = None

    @property
    def index(self) -> Index:
        """`parameter[place.index]` is the file's tensor, in either direction."""
        if self.expert is None:
            return (slice(None),)
        return (self.expert,) if self.rows is None else (self.expert, slice(*self.rows))


_MIXTRAL_NAMES = (Architecture.MIXTRAL, Architecture.SKYWORK_MOE)
_HARMLESS = re.compile(r"model\.layers\.\d{1,5}\.self_attn\.rotary_emb\.inv_freq")


def tensor_table(spec: ModelSpec, layout: Layout = Layout.HUB) -> dict[str, Place]:
    """Every tensor of a model directory: file name to place, in file order. The head is absent when tied."""
    table = {"model.embed_tokens.weight": Place("embed.weight", (spec.vocab_size, spec.hidden_size))}
    for layer in range(spec.num_layers):
        table |= _layer(spec, layer, layout)
    table["model.norm.weight"] = Place("norm.weight", (spec.hidden_size,))
    if not spec.tie_embeddings:
        table["lm_head.weight"] = Place("head.weight", (spec.vocab_size, spec.hidden_size))
    return table


def file_names(spec: ModelSpec, layout: Layout = Layout.HUB) -> dict[Place, str]:
    """The table the other way: place to file name."""
    return {place: name for name, place in tensor_table(spec, layout).items()}


def parameter_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Module names and shapes of all parameters, and of the expert-bias buffers, in file order."""
    return {place.parameter: place.shape for place in tensor_table(spec, Layout.FUSED).values()}


def detect_layout(names: Collection[str]) -> Layout:
    """The layout of a directory, from its tensor names."""
    fused = any(name.endswith((".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")) for name in names)
    return Layout.FUSED if fused else Layout.HUB


def is_harmless(name: str) -> bool:
    """Whether a tensor that is in no table may be passed over: rotary frequencies that old Llama files carry."""
    return _HARMLESS.fullmatch(name) is not None


def _layer(spec: ModelSpec, layer: int, layout: Layout) -> dict[str, Place]:
    file, module, dim = f"model.layers.{layer}", f"layers.{layer}", spec.hidden_size
    rows = {
        "input_layernorm.weight": ("attention_norm.weight", (dim,)),
        **_attention(spec),
        "post_attention_layernorm.weight": ("ffn_norm.weight", (dim,)),
    }
    if not spec.is_moe_layer(layer):
        rows |= _swiglu("mlp", "mlp", dim, spec.ffn_size, bias=spec.mlp_bias)
    table = {f"{file}.{name}": Place(f"{module}.{target}", shape) for name, (target, shape) in rows.items()}
    return table | (_moe(spec, file, module, layout) if spec.is_moe_layer(layer) else {})


_Rows = Mapping[str, tuple[str, tuple[int, ...]]]


def _attention(spec: ModelSpec) -> _Rows:
    dim, q_size, kv_size = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    sizes = {"q": (q_size, dim), "k": (kv_size, dim), "v": (kv_size, dim), "o": (dim, q_size)}
    rows: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (out, inner) in sizes.items():
        rows[f"self_attn.{name}_proj.weight"] = (f"attention.{name}.weight", (out, inner))
        if spec.o_bias if name == "o" else spec.qkv_bias:
            rows[f"self_attn.{name}_proj.bias"] = (f"attention.{name}.bias", (out,))
    if spec.qk_norm is not None:
        full = spec.qk_norm is QkNorm.FULL
        for name in "qk":
            width = sizes[name][0] if full else spec.head_dim
            rows[f"self_attn.{name}_norm.weight"] = (f"attention.{name}_norm.weight", (width,))
    return rows


def _swiglu(file: str, module: str, dim: int, size: int, *, bias: bool = False) -> _Rows:
    shapes = {"gate": (size, dim), "up": (size, dim), "down": (dim, size)}
    rows: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        rows[f"{file}.{name}_proj.weight"] = (f"{module}.{name}.weight", shape)
        if bias:
            rows[f"{file}.{name}_proj.bias"] = (f"{module}.{name}.bias", shape[:1])
    return rows


def _moe(spec: ModelSpec, file: str, module: str, layout: Layout) -> dict[str, Place]:
    assert spec.moe is not None
    moe, dim, target = spec.moe, spec.hidden_size, f"{module}.moe"
    block = f"{file}.block_sparse_moe" if _is_mixtral(spec) and layout is Layout.HUB else f"{file}.mlp"
    table = {f"{block}.gate.weight": Place(f"{target}.router.weight", (moe.num_experts, dim))}
    if moe.expert_bias:  # the name that DeepSeek's files use
        table[f"{block}.gate.e_score_correction_bias"] = Place(f"{target}.router.expert_bias", (moe.num_experts,))
    table |= dict(_experts(spec, block, target, layout))
    if moe.shared_ffn_size:
        shared = _swiglu("shared_expert", "shared", dim, moe.shared_ffn_size)
        table |= {f"{block}.{name}": Place(f"{target}.{place}", shape) for name, (place, shape) in shared.items()}
        table[f"{block}.shared_expert_gate.weight"] = Place(f"{target}.shared_gate.weight", (1, dim))
    return table


def _experts(spec: ModelSpec, block: str, target: str, layout: Layout) -> Iterator[tuple[str, Place]]:
    assert spec.moe is not None
    count, size, dim = spec.moe.num_experts, spec.moe.ffn_size, spec.hidden_size
    gate_up, down = f"{target}.experts.gate_up", f"{target}.experts.down"
    if layout is Layout.FUSED:
        yield f"{block}.experts.gate_up_proj", Place(gate_up, (count, 2 * size, dim))
        yield f"{block}.experts.down_proj", Place(down, (count, dim, size))
        return
    gate_name, up_name, down_name = ("w1", "w3", "w2") if _is_mixtral(spec) else ("gate_proj", "up_proj", "down_proj")
    for expert in range(count):
        prefix = f"{block}.experts.{expert}"
        yield f"{prefix}.{gate_name}.weight", Place(gate_up, (size, dim), expert, (0, size))
        yield f"{prefix}.{up_name}.weight", Place(gate_up, (size, dim), expert, (size, 2 * size))
        yield f"{prefix}.{down_name}.weight", Place(down, (dim, size), expert)


def _is_mixtral(spec: ModelSpec) -> bool:
    return spec.architecture in _MIXTRAL_NAMES
