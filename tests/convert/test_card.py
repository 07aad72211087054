"""The model card: what it tells, that hubs can read it, and that nothing from a parent can break out of its place."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from skymoe.convert.card import code, model_card, sentence
from skymoe.convert.exactness import export_targets
from skymoe.convert.licence import Licence
from skymoe.convert.made import Made, ParentRecord
from skymoe.convert.measured import Receipt
from skymoe.spec.flops import count_parameters
from skymoe.spec.model import Architecture, GateNormSpec, ModelSpec, MoESpec

SPEC = ModelSpec(
    architecture=Architecture.MIXTRAL,
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    ffn_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    moe=MoESpec(num_experts=8, top_k=2, ffn_size=64),
)
PARENT = ParentRecord(
    name="some-org/a-model",
    architecture=Architecture.LLAMA,
    parameters=12345,
    sha256={"config.json": "0" * 64, "model.safetensors": "1" * 64},
    unread={"unheard_of": 3},
    licence=Licence("apache-2.0", files=("LICENSE",)),
)
MADE = Made("upcycle", "copy", (PARENT,), "Every expert is a copy.", {"experts": 8}, 7, ("a remark",), True)
RECEIPT = Receipt(
    1.25e-6, 3e-12, 17.5, True, "the weights sum to 1", 256, 7, tokens="192 of text, 64 random", reference_loss=2.5,
    loss=2.500001, reference_perplexity=12.18, perplexity=12.19, top1_agreement=0.995, experts_reached=15,
    num_experts=16, exports=export_targets(SPEC),
)  # fmt: skip


def front_matter(card):
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    return yaml.safe_load(match[1])


def test_what_hubs_read():
    card = model_card(SPEC, MADE, RECEIPT, licence_files=["LICENSE"])
    assert front_matter(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": ["some-org/a-model"],
        "license": "apache-2.0",
        "tags": ["skymoe", "upcycle", "mixtral", "moe", "mixture-of-experts"],
    }
    quantized = model_card(SPEC, replace(MADE, command="quantize"), None)
    assert front_matter(quantized)["base_model_relation"] == "quantized"


def test_what_people_read():
    card = model_card(SPEC, MADE, RECEIPT, licence_files=["LICENSE"])
    count = count_parameters(SPEC)
    for told in (
        "Every expert is a copy.", "router weights are random and untrained", "- a remark", '"experts": 8',
        f"{count.total:,}, of which one token uses {count.active:,}", "8 per layer, of width 64; a token uses 2",
        "| seed | 7 |", "`some-org/a-model`: llama, 12,345 parameters", f"| `model.safetensors` | `{'1' * 64}` |",
        "`unheard_of`", "**Exact**: the weights sum to 1.", "1.25e-06 (largest logit 17.5)", "2.500000, 2.500001",
        "99.5 %", "15 of 16", "| `qwen3_moe` | no |", "| `gguf` | exact |", "vllm serve DIR`", "`apache-2.0`",
        "192 of text, 64 random; seed 7",
    ):  # fmt: skip
        assert told in card
    assert "trust" not in card.partition("## Load it")[2]
    assert "Skywork" not in card.partition("## Licence")[2]
    assert model_card(SPEC, MADE, RECEIPT, licence_files=["LICENSE"]) == card


def test_trained_routers_and_unmeasured_models():
    card = model_card(replace(SPEC, moe=None, architecture=Architecture.LLAMA), replace(MADE, new_routers=False), None)
    assert "untrained" not in card
    assert "Receipt" not in card
    assert "A dense language model" in card
    unmeasured = Receipt(None, None, None, False, "noise (not measured)", 0, 0, "not at all")
    card = model_card(SPEC, MADE, unmeasured)
    assert "**Not exact**: noise \\(not measured\\)." in card or "**Not exact**: noise (not measured)." in card
    assert "largest difference" not in card


def test_how_our_own_and_skyworks_formats_are_loaded():
    norm = replace(SPEC, architecture=Architecture.SKYMOE, moe=replace(SPEC.moe, gate_norm=GateNormSpec(scale=2)))
    card = model_card(norm, MADE, None)
    assert "trust_remote_code=True" in card
    assert "import skymoe" in card
    assert "scale 2, ddof 1, eps 1e-06" in card
    card = model_card(replace(SPEC, architecture=Architecture.SKYWORK_MOE), MADE, None)
    assert "AutoModelForCausalLM" not in card
    assert "skymoe.load" in card


def test_licences():
    skywork = replace(PARENT, licence=Licence("other", "skywork-community-license", is_skywork=True))
    card = model_card(SPEC, replace(MADE, parents=(skywork,)), None, licence_files=["Skywork License.pdf"])
    assert "The Skywork Community License applies to weights derived from Skywork models" in card
    front = front_matter(card)
    assert (front["license"], front["license_name"]) == ("other", "skywork-community-license")
    assert front["license_link"] == "Skywork License.pdf"
    several = front_matter(model_card(SPEC, replace(MADE, parents=(PARENT, skywork)), None))
    assert (several["license"], several["license_name"]) == ("other", "several-licences-see-model-card")
    silent = model_card(SPEC, replace(MADE, parents=(replace(PARENT, licence=Licence()),)), None)
    assert "license" not in front_matter(silent)
    assert "no licence was found" in silent


def test_many_files_are_counted():
    shards = {f"model-{n:05d}-of-00060.safetensors": "a" * 64 for n in range(60)}
    card = model_card(SPEC, replace(MADE, parents=(replace(PARENT, sha256=shards),)), None)
    assert "36 more in `skymoe.json`" in card


HOSTILE = [
    "x\n---\nlicense: mit\n# owned", "`</code><script>alert(1)</script>", "| a | b |\n| - | - |", "a\\|b",
    "![x](http://evil/x.png)",
    "[click](javascript:alert(1))", "\x1b[31mred", "a\u202eb", "```\n# out", "<!-- ", "https://evil.example/x",
    "&lt;b&gt;",
    "\\`", "www.evil.example", "\x00", " ", "", "'", '"', "- item", "x" * 5000, "\ufeff", "```", "~~~", "$$x$$",
    "\u2028x",
]  # fmt: skip


def as_parent(text):
    return replace(PARENT, name=text, sha256={text: text}, unread={text: text}, licence=Licence("other", text, text))


def without_code(card):
    """The card's Markdown less fenced blocks and code spans: what is left would be rendered."""
    body = re.sub(r"```json\n.*?\n```\n", "", card, flags=re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", body)


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_breaks_out(text):
    made = replace(MADE, parents=(as_parent(text),), remarks=(text,), summary=text, method=text, options={"a": text})
    plain = replace(MADE, parents=(as_parent("x"),), remarks=("x",), summary="x", method="x", options={"a": "x"})
    receipt = replace(RECEIPT, reason=text, tokens=text)
    card = model_card(SPEC, made, receipt, licence_files=[text])
    same = model_card(SPEC, plain, replace(RECEIPT, reason="x", tokens="x"), licence_files=["x"])
    assert front_matter(card).keys() <= {*front_matter(same), "base_model"}
    assert all(char.isprintable() or char == "\n" for char in card)
    rendered = without_code(card.partition("\n---\n")[2])
    assert "<" not in rendered
    assert not re.search(r"(?<!\\)\]\(|://|www\.|(?<!\\)!\[", rendered)
    headings = [line for line in card.splitlines() if line.startswith("#")]
    assert headings == [line for line in same.splitlines() if line.startswith("#")]
    cells = [line.replace("\\|", "").count("|") for line in card.splitlines() if line.startswith("|")]
    assert cells == [line.replace("\\|", "").count("|") for line in same.splitlines() if line.startswith("|")]


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_code_spans_and_sentences_of_any_text(text):
    span = code(text)
    assert re.fullmatch(r"`[^`\n]+`", span)
    assert span.isprintable()
    assert "|" not in span
    told = sentence(text)
    assert told.isprintable() or not told
    assert not re.search(r"[<>]|(?<!\\)[`*_\[\]|]", told.replace("\\\\", ""))
