"""Chat templates in the manner of common ones, and tokenizers whose special tokens they use. All written here."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

CHATML = """{% for message in messages %}
{% if loop.first and message.role != 'system' %}
{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
{% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{% endif %}
"""

HEADERS = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message['content'] | trim }}{% endgeneration %}
    {%- else %}
        {{- message['content'] | trim }}
    {%- endif %}
    {{- eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

INSTRUCTIONS = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] %}
{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}
{% for message in rest %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('user and assistant have to take turns') }}
{% endif %}
{% if message['role'] == 'user' %}
[INST] {% if loop.first and first %}{{ first }}

{% endif %}{{ message['content'] }} [/INST]
{%- else %}
{{ ' ' + message['content'] + eos_token }}
{%- endif %}
{% endfor %}
"""

COMPOSED = """{% for message in messages %}<|{{ message.role }}|>
{{ message.content }}<|end|>
{% endfor %}{% if add_generation_prompt %}{{ '<|' ~ 'assistant' ~ '|>' }}
{% endif %}"""

TOOLS = """{% set ns = namespace(n=0) %}{% for tool in tools or [] %}<|im_start|>tool
{{ tool | tojson }}
{{ tool | tojson(indent=2, sort_keys=true) }}<|im_end|>
{% endfor %}{% macro part(role, text) %}{% if role == 'skip' %}{% else %}<|im_start|>{{ role }}
{{ text }}<|im_end|>
{% endif %}{% endmacro %}{% for message in messages %}{% if message.role == 'developer' %}{% continue %}{% endif %}
{% set ns.n = ns.n + 1 %}{% for call in message.tool_calls or [] %}
{{ part('call', call.function.arguments.items() | list) }}
{% endfor %}{% set text = message.content or '' %}
{% if '</think>' in text %}{% set text = text.split('</think>')[-1] %}{% endif %}
{{- part(message.role, text | replace('<|im_end|>', '(end)')) }}{% endfor %}{{ ns.n }} {{ strftime_now('%Y') }}
{%- if thinking is defined and not thinking %}off{% endif %}
"""

BESIDE = (
    "{% for message in messages %}{{ message.content }}{% endfor %}<|im_end|>"  # two clients' texts, nothing between
)

TEMPLATES = {
    "ChatML": CHATML, "headers": HEADERS, "instructions": INSTRUCTIONS, "composed": COMPOSED, "tools": TOOLS,
    "beside": BESIDE,
}  # fmt: skip
SPECIAL = [
    "<|begin|>", "<|eot|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "[INST]",
    "[/INST]", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
]  # fmt: skip


@functools.cache
def byte_level_json() -> str:
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        special_tokens=SPECIAL,
    )
    text = "system user assistant\n\n content of the conversation <|im_start|> im_end start_header_id\n [INST] of them"
    backend.train_from_iterator([text] * 3, trainer)
    backend.add_tokens(["<think>", "</think>"])  # added, and ordinary
    return str(backend.to_str())


@functools.cache
def metaspace_json() -> str:
    """A space goes before the first text only, and one special token takes the spaces around it."""
    import tokenizers

    pieces = ["<unk>", *SPECIAL, "▁", *"abcdefghijklmnopqrstuvwxyz", "▁a", "us", *(f"<0x{i:02X}>" for i in range(256))]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    model = tokenizers.models.BPE(vocab, [("▁", "a"), ("u", "s")], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    decoders = tokenizers.decoders
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    greedy = ("<|im_start|>", "[/INST]")
    backend.add_special_tokens(
        [tokenizers.AddedToken(text, special=True, lstrip=text in greedy, rstrip=text in greedy) for text in SPECIAL]
    )
    return str(backend.to_str())


@functools.cache
def unigram_json() -> str:
    """A vocabulary that can write a special token as a word of its own."""
    import tokenizers

    words = [("<unk>", -20.0), *((token, -1.0) for token in SPECIAL)]
    words += [(chr(code), -5.0) for code in range(33, 127)] + [("▁", -3.0), ("\n", -3.0)]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(words, unk_id=0, byte_fallback=False))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.add_special_tokens(SPECIAL)
    return str(backend.to_str())


def model_directory(path: Path, tokenizer_json: str, template: Any, **config: Any) -> Path:
    """A directory with a tokenizer and, in its configuration, a template."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(tokenizer_json, "utf-8")
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|eot|>", **config}
    if template is not None:
        content["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(content), "utf-8")
    return path
