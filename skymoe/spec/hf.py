"""config.json <-> ModelSpec, for every architecture we read and write.

Reading is strict: each field is type-checked (`fields.py`), an unknown architecture and a feature we do not compute
are refused by name, and a field that is absent takes the default of the transformers class it belongs to, which is
what every other tool does. Fields that change nothing (cache flags, version stamps) are left behind; `unread_fields`
lists them for the record.

Writing checks first what the target format can carry (`uncarried`): a Mixtral file has no place for biases or for
gate normalization, so asking for that is an error, not a model that quietly lost something. Our own `model_type:
"skymoe"` carries everything a ModelSpec can say; docs/formats.md has the table.

`auto_map` and Python files beside the weights are never looked at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skymoe.base.errors import ConfigError, FormatError, printable
from skymoe.base.inside import inside
from skymoe.base.log import logger
from skymoe.base.strict_json import read_json_object
from skymoe.spec.fields import Fields
from skymoe.spec.hf_attention import read_attention, write_attention
from skymoe.spec.hf_families import FAMILIES, Family, uncarried
from skymoe.spec.hf_ffn import read_ffn, write_ffn
from skymoe.spec.hf_rope import read_rope, write_rope
from skymoe.spec.model import Architecture, ModelSpec
from skymoe.spec.quantization import read_quantization

CONFIG_NAME = "config.json"
MAX_CONFIG_BYTES = 4 * 2**20
MAX_LAYERS = 10_000

_UNRECORDED = ("auto_map", "dtype", "torch_dtype")
_MAX_RECORDED, _MAX_RECORDED_SIZE = 100, 500
_CLASS_SUFFIX = "ForCausalLM"
_REFUSED_NUMBERS = ("clip_qkv",)  # of OLMoE
_REFUSED_FLAGS = ("moe_2layer_gate", "add_cross_attention", "is_encoder_decoder")
_TRAINING_NOISE = ("attention_dropout", "resid_pdrop", "embd_pdrop", "router_jitter_noise", "hidden_dropout")


def read_config(directory: Path) -> dict[str, Any]:
    """The content of `directory`/config.json as a plain dict, read strictly.

    Raises:
        FormatError: no such directory or file, larger than 4 MiB, not a JSON object, NaN, duplicate keys, a link
            that leads out of the directory.
    """
    if not directory.is_dir():
        raise FormatError("there is no such model directory", where=directory, hint="give the directory of config.json")
    path = directory / CONFIG_NAME
    if path.is_symlink():
        inside(directory, CONFIG_NAME)  # a link that leads out of the directory is refused
    return read_json_object(path, max_bytes=MAX_CONFIG_BYTES)


def spec_from_directory(directory: Path) -> ModelSpec:
    """The ModelSpec of the model in `directory`. Raises FormatError."""
    return spec_from_config(read_config(directory), where=directory / CONFIG_NAME)


def spec_from_config(config: Mapping[str, Any], *, where: object = CONFIG_NAME) -> ModelSpec:
    """Translate a parsed `config.json`.

    Args:
        config: the JSON object.
        where: the file, named in errors.

    Raises:
        FormatError: naming the field and the file.
    """
    fields = Fields(config, where)
    spec = _read(fields, where)
    if unread := fields.unread():
        logger.debug("%s: fields without effect here: %s", where, ", ".join(unread)[:1000])
    return spec


def unread_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config that say nothing a ModelSpec holds, so that a conversion can record what it left behind.

    Nulls are left out, and so are `auto_map` (code) and the number formats (those of the files count). Parts of
    `rope_scaling` have dotted names.

    Returns:
        At most 100 fields; a value longer than 500 characters of JSON is replaced by a remark.

    Raises:
        FormatError: the config is one that `spec_from_config` refuses.
    """
    fields = Fields(config, CONFIG_NAME)
    _read(fields, CONFIG_NAME)
    left = [(name, value) for name, value in fields.unread().items() if value is not None and name not in _UNRECORDED]
    return {printable(name, 100): _short(value) for name, value in left[:_MAX_RECORDED]}


def config_from_spec(spec: ModelSpec, *, dtype: str = "float32") -> dict[str, Any]:
    """The `config.json` of `spec`, for transformers v5, older ones, and the serving engines.

    Raises:
        ConfigError: the architecture cannot carry something `spec` says (see `uncarried`).
    """
    if reasons := uncarried(spec):
        raise ConfigError(
            f"a {spec.architecture} model directory cannot carry this model",
            why="; ".join(reasons),
            hint=f"architecture {Architecture.SKYMOE} carries everything",
        )
    family = FAMILIES[spec.architecture]
    eos: int | list[int] | None = list(spec.eos_ids) if len(spec.eos_ids) > 1 else next(iter(spec.eos_ids), None)
    return {
        "architectures": [family.hf_class],
        "model_type": family.model_type,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": spec.max_position,
        "rms_norm_eps": spec.norm_eps,
        "initializer_range": spec.init_std,
        "tie_word_embeddings": spec.tie_embeddings,
        "attention_dropout": 0.0,
        "bos_token_id": spec.bos_id,
        "eos_token_id": eos,
        "pad_token_id": spec.pad_id,
        "use_cache": spec.use_cache,
        "dtype": dtype,
        "torch_dtype": dtype,
        **write_rope(spec.rope, max_position=spec.max_position, old=family.model_type == "skywork"),
        **write_attention(spec),
        **write_ffn(spec),
    }


def generation_config(spec: ModelSpec) -> dict[str, Any]:
    """The `generation_config.json` of `spec`: the special tokens, nothing about sampling."""
    config = config_from_spec(spec)
    tokens = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {name: value for name, value in tokens.items() if value is not None}


def _read(fields: Fields, where: object) -> ModelSpec:
    architecture = _architecture(fields)
    _refuse_unsupported(fields)
    try:
        return ModelSpec(architecture=architecture, **_body(fields, architecture), **read_ffn(fields, architecture))
    except ConfigError as error:  # ModelSpec's own validation does not know the file
        raise FormatError(error.what, where=where) from error


def _short(value: object) -> object:
    size = len(json.dumps(value))
    return value if size <= _MAX_RECORDED_SIZE else f"({size} characters)"


def _architecture(fields: Fields) -> Architecture:
    model_type = fields.text("model_type", "")
    classes = fields.texts("architectures")
    if any(not name.endswith(_CLASS_SUFFIX) for name in classes):
        told = printable(", ".join(classes[:9]), 200)
        raise fields.error(
            "architectures", f"is {told}: only causal language models (...{_CLASS_SUFFIX}) are supported"
        )
    matches = [kind for kind, family in FAMILIES.items() if family.model_type == model_type]
    if not model_type:
        matches = [kind for kind, family in FAMILIES.items() if family.hf_class in classes]
    if not matches:
        known = ", ".join(sorted({family.model_type for family in FAMILIES.values()}))
        told = model_type or ", ".join(classes)
        if not told:
            raise fields.error("model_type", "is missing", hint=f"known: {known}")
        raise fields.error("model_type", f"{told!r} is not supported", hint=f"known: {known}")
    if Architecture.SKYWORK_MOE in matches:  # one name for both; the experts tell them apart
        has_experts = "num_experts" in fields or "num_local_experts" in fields
        return Architecture.SKYWORK_MOE if has_experts else Architecture.SKYWORK
    return matches[0]


def _refuse_unsupported(fields: Fields) -> None:
    activation = fields.text("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise fields.error("hidden_act", f"{activation!r} is not supported", hint="only silu (SwiGLU) is")
    for name in _TRAINING_NOISE:
        if fields.number(name, 0.0) != 0.0:
            raise fields.error(name, "must be 0", why="noise in training is not implemented", hint="set it to 0")
    for name in _REFUSED_NUMBERS:
        if name in fields:
            raise fields.error(name, "is set: clipped queries, keys and values are not supported", hint="only null is")
    for name in _REFUSED_FLAGS:
        if fields.flag(name, False):
            raise fields.error(name, "is not supported")
    read_quantization(fields)  # a matter of the files (weights.scales); refused here where it is not read


def _body(fields: Fields, architecture: Architecture) -> dict[str, Any]:
    family = FAMILIES[architecture]
    num_heads = fields.integer("num_attention_heads")
    hidden_size = fields.integer("hidden_size")
    max_position = fields.integer("max_position_embeddings", family.max_position)
    head_dim = fields.integer("head_dim", family.head_dim or max(1, hidden_size // num_heads))
    if "head_dim" not in fields and family.head_dim is None and hidden_size % num_heads:
        raise fields.error(
            "head_dim", f"is missing and hidden_size {hidden_size} is not a multiple of {num_heads} heads"
        )
    num_layers = fields.integer("num_hidden_layers")
    if num_layers > MAX_LAYERS:
        raise fields.error("num_hidden_layers", f"must be at most {MAX_LAYERS}, got {num_layers}")
    bos, eos, pad = family.tokens
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": _num_kv_heads(fields, family, num_heads),
        "head_dim": head_dim,
        "max_position": max_position,
        "norm_eps": fields.number("rms_norm_eps", family.norm_eps),
        "rope": read_rope(fields, max_position=max_position, default_theta=family.theta),
        "tie_embeddings": fields.flag("tie_word_embeddings", False),
        "init_std": fields.number("initializer_range", 0.02),
        "use_cache": fields.flag("use_cache", True),
        "bos_id": _token(fields, "bos_token_id", bos),
        "eos_ids": _tokens(fields, "eos_token_id", eos),
        "pad_id": _token(fields, "pad_token_id", pad),
        **read_attention(fields, architecture, num_layers),
    }


def _num_kv_heads(fields: Fields, family: Family, num_heads: int) -> int:
    optional = family.kv_heads_optional or fields.has("num_key_value_heads")  # a null means as many as query heads
    return fields.integer("num_key_value_heads", num_heads if optional else None)


def _token(fields: Fields, name: str, default: int | None) -> int | None:
    if not fields.has(name):
        return default
    value = fields.raw(name)
    if value is None or value == -1:  # old Llama files write -1 for "none"
        return None
    return fields.integer(name, minimum=0)


def _tokens(fields: Fields, name: str, default: int | None) -> tuple[int, ...]:
    if fields.has(name) or default is None:
        return fields.integers(name)
    return (default,)
