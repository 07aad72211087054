"""Random damage to model directories: read, or refused in words; nothing else, whatever the bytes.

Four kinds of damage: raw bytes of the header, a header of arbitrary entries, fields of config.json, the index. The
seeds are fixed; the long run (`slow`) has 24,000 examples.
"""

from __future__ import annotations

import json
import math
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.hostile_models import BASES
from faults.hostile_tools import CONFIG, INDEX, WEIGHTS, container, split
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skymoe.base.errors import SkymoeError
from skymoe.inspect.config import InspectConfig
from skymoe.inspect.run import run as inspect
from skymoe.model.load import load
from skymoe.spec.hf import config_from_spec, spec_from_config
from skymoe.spec.hf_families import FAMILIES, carried
from skymoe.spec.model import ModelSpec


@dataclass
class Field:
    """Where the examples are made.

    Attributes:
        models: valid directories.
        outcomes: how many examples were read, and how many refused.
    """

    models: dict[str, Path]
    outcomes: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("fuzz")
    return {name: make(root / name) for name, make in BASES.items()}


def check_reading(directory: Path, fuzzed: Field) -> None:
    """The model is read whole, and can be written down again; or the error is ours, short, printable, and names it."""
    beside = sorted(os.listdir(directory.parent)), sorted(os.listdir(directory))
    try:
        inspect(InspectConfig(model=str(directory)))
        check_writing(load(directory).spec)
        fuzzed.outcomes[True] += 1
    except SkymoeError as error:
        message = str(error)
        assert error.exit_code == 2
        assert str(directory) in message
        assert message.replace("\n", "").isprintable() and len(message) < 4000
        fuzzed.outcomes[False] += 1
    assert (sorted(os.listdir(directory.parent)), sorted(os.listdir(directory))) == beside


def check_writing(spec: ModelSpec) -> None:
    spec, _ = carried(spec)
    config = json.loads(json.dumps(config_from_spec(spec), allow_nan=False))
    again = spec_from_config(config)
    assert config_from_spec(again) == config_from_spec(spec)


# ---- what a number, a name or any value may be

HUGE = st.sampled_from([0, 1, -1, 2**31 - 1, 2**31, 2**53, 2**62, 2**63, 2**64, 10**18, 10**400, -(2**63)])
FLOATS = st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([0.0, -0.0, 1e-320, 1e18, 1e308, 0.5, 2.0])
WORDS = st.sampled_from(
    ["", "..", "../x", "/etc/passwd", "\0", "\x1b[2J", "\u202e", "\ud800", "x" * 5000, "true", "NaN", "silu", "linear",
     "dynamic", "yarn", "llama3", "longrope", "fp8", "fp8_e4m3", "compressed-tensors", "full_attention",
     "sliding_attention", "F32", "BF16", "F8_E4M3", "U16", *(family.model_type for family in FAMILIES.values())]
)  # fmt: skip
LEAVES = st.none() | st.booleans() | HUGE | st.integers(-3, 300) | FLOATS | WORDS | st.text(max_size=9)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS | st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
SMALL = st.integers(0, 70)


# ---- four kinds of damage

TOKENS = [
    b"0",
    b'"',
    b"-",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"9999999999",
    b"\\u0000",
    b"1e9",
    b"null",
    b"NaN",
    b"\xff",
]


def damage_bytes(draw: Callable[..., Any], directory: Path) -> None:
    raw = bytearray((directory / WEIGHTS).read_bytes())
    end = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(draw(st.integers(1, 5))):
        place = draw(st.integers(0, end - 1) | st.integers(0, 15))
        kind = draw(st.sampled_from(("flip", "byte", "insert", "delete", "copy", "move", "cut")))
        if kind == "flip":
            raw[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte":
            raw[place] = draw(st.integers(0, 255))
        elif kind == "insert":
            raw[place:place] = draw(st.sampled_from(TOKENS))
        elif kind == "delete":
            del raw[place : place + draw(st.integers(1, 9))]
        elif kind == "copy":
            raw[place:place] = raw[place : place + draw(st.integers(1, 90))]
        elif kind == "move":
            other = draw(st.integers(0, end - 1))
            raw[place : place + 8], raw[other : other + 8] = raw[other : other + 8], raw[place : place + 8]
        else:
            del raw[draw(st.integers(0, len(raw))) :]
        if len(raw) < 16:
            break
        end = min(end, len(raw))
    if draw(st.booleans()) and len(raw) > 8:  # the length that fits what is there now
        raw[:8] = (raw.find(b"}}") + 2 - 8).to_bytes(8, "little", signed=True)
    (directory / WEIGHTS).write_bytes(raw)


def damage_header(draw: Callable[..., Any], directory: Path) -> None:
    header, data = split(directory / WEIGHTS)
    names = sorted(header.keys() - {"__metadata__"})
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(
            st.sampled_from(("entry", "dtype", "shape", "offsets", "rename", "remove", "add", "resize", "metadata"))
        )
        name = draw(st.sampled_from(names))
        entry = header.get(name)
        if kind == "entry":
            header[name] = draw(VALUES)
        elif kind == "rename" and name in header:
            header[draw(WORDS | st.sampled_from(names) | st.text(max_size=20))] = header.pop(name)
        elif kind == "remove":
            header.pop(name, None)
        elif kind == "metadata":
            header["__metadata__"] = draw(VALUES)
        elif kind == "add":
            header[draw(st.text(max_size=20))] = {"dtype": "F32", "shape": [0, draw(HUGE)], "data_offsets": [0, 0]}
        elif isinstance(entry, dict) and kind == "resize":  # consistent, so that it gets further
            shape = draw(st.lists(SMALL, max_size=4))
            begin = draw(st.integers(0, len(data)))
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, begin + 4 * math.prod(shape)]}
        elif isinstance(entry, dict):
            word = st.sampled_from(["F32", "BF16", "F16", "F8_E4M3", "F64", "I64", "BOOL"])
            values = word if kind == "dtype" else st.lists(SMALL | HUGE, max_size=3)
            entry["data_offsets" if kind == "offsets" else kind] = draw(VALUES | values | values)
    if draw(st.booleans()):
        data = repack(header, data)
    (directory / WEIGHTS).write_bytes(container(header, data))


def repack(header: dict[str, Any], data: bytes) -> bytes:
    """Make the ranges fit dtypes and shapes again where these make sense, so that the file gets past its header."""
    sizes = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8, "F8_E4M3": 1, "I64": 8, "BOOL": 1}
    end = 0
    for entry in header.values():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, list) or not all(type(dim) is int and 0 <= dim < 10**4 for dim in shape):
            continue
        size = math.prod(shape) * sizes.get(entry["dtype"] if isinstance(entry.get("dtype"), str) else "", 0)
        if size < 10**6:
            entry["data_offsets"] = [end, end + size]
            end += size
    return data[:end] + bytes(max(0, end - len(data)))


FIELDS = [
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "initializer_range", "rope_theta",
    "rope_scaling", "rope_parameters", "original_max_position_embeddings", "partial_rotary_factor", "hidden_act",
    "attention_dropout", "attention_bias", "mlp_bias", "qkv_bias", "o_bias", "qk_norm", "tie_word_embeddings",
    "sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "model_type", "architectures",
    "num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
    "shared_expert_intermediate_size", "decoder_sparse_step", "mlp_only_layers", "moe_layers", "gate_norm",
    "gate_norm_scale", "gate_norm_ddof", "gate_norm_eps", "gate_norm_subtract_mean", "expert_bias",
    "moe_expert_interval", "moe_use_logits_norm", "moe_gate_norm_std", "moe_use_mixtral_gating",
    "quantization_config", "bos_token_id", "eos_token_id", "pad_token_id", "auto_map", "torch_dtype", "dtype",
    "clip_qkv", "router_jitter_noise", "transformers_version",
]  # fmt: skip
NESTED = {
    "rope_parameters": ("rope_type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast",
                        "beta_slow", "low_freq_factor", "high_freq_factor", "attention_factor", "mscale", "truncate"),
    "rope_scaling": ("rope_type", "type", "factor", "original_max_position_embeddings", "low_freq_factor",
                     "high_freq_factor", "beta_fast", "mscale_all_dim"),
    "quantization_config": ("quant_method", "weight_block_size", "activation_scheme", "fmt", "modules_to_not_convert",
                            "config_groups", "ignore", "bits"),
}  # fmt: skip


RAW = ["NaN", "Infinity", "1e999", "{", "]", '"', "9" * 5000, "\x00"]


def damage_config(draw: Callable[..., Any], directory: Path) -> None:
    config = json.loads((directory / CONFIG).read_text())
    for _ in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from(FIELDS) | st.sampled_from(sorted(config)))
        kind = draw(st.sampled_from(("value", "number", "nested", "remove", "other", "type")))
        if kind == "remove":
            config.pop(name, None)
        elif kind == "number":
            config[name] = draw(HUGE | SMALL | FLOATS)
        elif kind == "nested":
            outer = draw(st.sampled_from(sorted(NESTED)))
            inner = config[outer] if isinstance(config.get(outer), dict) else {}
            config[outer] = inner | {draw(st.sampled_from(NESTED[outer])): draw(VALUES | HUGE | FLOATS)}
        elif kind == "other":
            config[draw(st.text(max_size=12))] = draw(VALUES)
        elif kind == "type":
            config["model_type"] = draw(WORDS)
            config.pop("architectures", None)
        else:
            config[name] = draw(VALUES)
    text = json.dumps(config)
    if draw(st.integers(0, 9)) == 0:  # what json.dumps would not write
        place = draw(st.integers(0, len(text)))
        text = (
            text[:place]
            + draw(st.sampled_from(["NaN", "Infinity", "1e999", "{", "]", '"', "9" * 5000, "\x00"]))
            + text[place:]
        )
    (directory / CONFIG).write_text(text)


def damage_index(draw: Callable[..., Any], directory: Path) -> None:
    index = json.loads((directory / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    for _ in range(draw(st.integers(1, 4))):
        target = index["weight_map"]
        kind = draw(st.sampled_from(("shard", "name", "remove", "map", "field", "swap")))
        if kind == "field" or not isinstance(target, dict) or not target:
            index[draw(st.sampled_from(["metadata", "weight_map", "x"]))] = draw(VALUES)
            break
        name = draw(st.sampled_from(sorted(target)))
        if kind == "shard":
            target[name] = draw(VALUES | WORDS.map(lambda word: f"{word}.safetensors"))
        elif kind == "name":
            target[draw(WORDS | st.text(max_size=20))] = draw(st.sampled_from(shards))
        elif kind == "remove":
            del target[name]
        elif kind == "swap":
            target[name] = draw(st.sampled_from(shards))
        else:
            index["weight_map"] = draw(VALUES)
    (directory / INDEX).write_text(json.dumps(index))


@dataclass(frozen=True)
class Damage:
    """One kind of damage, the valid models it is done to, and the file that it changes."""

    do: Callable[[Callable[..., Any], Path], None]
    bases: tuple[str, ...]
    file: str


KINDS = {
    "bytes": Damage(damage_bytes, ("dense", "skymoe", "fp8"), WEIGHTS),
    "header": Damage(damage_header, ("dense", "fp8"), WEIGHTS),
    "config": Damage(damage_config, ("dense", "moe", "skymoe", "fp8"), CONFIG),
    "index": Damage(damage_index, ("sharded",), INDEX),
}


def campaign(damage: Damage, models: dict[str, Path], examples: int) -> Field:
    """`examples` damaged directories, read one after another; each file is restored after its turn."""
    fuzzed = Field(models)
    valid = {name: (models[name] / damage.file).read_bytes() for name in damage.bases}

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(data=st.data())
    def one(data: st.DataObject) -> None:
        directory = models[data.draw(st.sampled_from(damage.bases))]
        try:
            damage.do(data.draw, directory)
            check_reading(directory, fuzzed)
        finally:
            (directory / damage.file).write_bytes(valid[directory.name])

    one()
    return fuzzed


def check_campaign(kind: str, models: dict[str, Path], examples: int, max_growth: int) -> None:
    torch.set_num_threads(1)
    campaign(KINDS[kind], models, 10)  # hypothesis builds its tables of Unicode, which are large
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = campaign(KINDS[kind], models, examples).outcomes
    assert sum(outcomes.values()) >= examples
    assert outcomes[False] > examples // 2, outcomes
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < max_growth


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_models(kind: str, models: dict[str, Path]) -> None:
    check_campaign(kind, models, 150, 64 * 2**20)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_models_at_length(kind: str, models: dict[str, Path]) -> None:
    check_campaign(kind, models, 6000, 256 * 2**20)  # most of it is what hypothesis remembers
