"""The model card: what a model is, how it was made, what the receipt says, how to load it, under which licence.

The same inputs give the same text. Names and values that come from a parent's files are hostile: they appear in code
spans with control characters escaped, so that neither Markdown nor HTML nor a table can be broken out of; sentences
are escaped; the front matter is written by a YAML dumper.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import yaml

from skymoe import __version__
from skymoe.base.errors import printable
from skymoe.convert.made import Made, ParentRecord
from skymoe.convert.measured import Receipt
from skymoe.spec.flops import count_parameters
from skymoe.spec.model import Architecture, ModelSpec

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#!|~])")
_MAX_FILES = 24  # whose hashes the card shows; skymoe.json has all
_RELATIONS = {"quantize": "quantized"}
_NEW_ROUTERS = (
    "The router weights are random and untrained: which experts a token visits means nothing yet. The model is a start "
    "for training, not a better model than its parent."
)


def model_card(spec: ModelSpec, made: Made, receipt: Receipt | None, *, licence_files: Sequence[str] = ()) -> str:
    """The content of README.md.

    Args:
        spec: what the model is.
        made: how it came to be.
        receipt: how it compares with its parent; None when nothing is known.
        licence_files: names of the licence files beside it.
    """
    parts = [
        f"---\n{_front_matter(spec, made, licence_files)}---",
        f"# A {_kind(spec)} made by skymoe {made.command}",
        *_about(spec, made),
        *_parents(made.parents),
        *(_receipt(receipt) if receipt else []),
        *_loading(spec),
        *_licence(made, licence_files),
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def code(text: object, limit: int = 200) -> str:
    """`text` as a code span that nothing in it can end, also within a table (where a bar cannot always be escaped)."""
    told = printable(text, limit).replace("`", "'").replace("|", "\u00a6")
    return f"`{told}`" if told.strip() else "`(empty)`"


def sentence(text: object) -> str:
    """`text` as plain Markdown: nothing in it is markup, nothing becomes a link."""
    told = _MARKDOWN.sub(r"\\\1", html.escape(printable(text, 2000), quote=False))
    return told.replace("://", "&#58;//").replace("www.", "www&#46;")


# ---- the parts


def _front_matter(spec: ModelSpec, made: Made, licence_files: Sequence[str]) -> str:
    names = list(dict.fromkeys(parent.name for parent in made.parents if _HUB_ID.fullmatch(parent.name)))
    data: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if names:
        data["base_model"] = names
    if names and made.command in _RELATIONS:
        data["base_model_relation"] = _RELATIONS[made.command]
    data |= _license_fields(made.parents, licence_files)
    tags = ["skymoe", made.command, spec.architecture.value, *(["moe", "mixture-of-experts"] if spec.moe else [])]
    data["tags"] = list(dict.fromkeys(tags))
    return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=False, width=1000))


def _license_fields(parents: Sequence[ParentRecord], licence_files: Sequence[str]) -> dict[str, str]:
    """The parents' licence if they agree; else "other", and the card tells."""
    said = {(parent.licence.identifier, parent.licence.name, parent.licence.link) for parent in parents}
    if len(said) > 1:
        return {"license": "other", "license_name": "several-licences-see-model-card"}
    identifier, name, link = next(iter(said), ("", "", ""))
    if not identifier:
        return {}
    fields = {"license": identifier}
    if identifier == "other":
        fields["license_name"] = re.sub(r"[^a-z0-9.-]+", "-", name.lower()).strip("-") or "see-licence-files"
        fields |= {"license_link": link or licence_files[0]} if link or licence_files else {}
    return fields


def _kind(spec: ModelSpec) -> str:
    return "mixture of experts" if spec.moe else "dense language model"


def _about(spec: ModelSpec, made: Made) -> Iterator[str]:
    if made.summary:
        yield sentence(made.summary)
    if made.new_routers:
        yield _NEW_ROUTERS
    yield _table(("", ""), [*_facts(spec), ("made by", f"skymoe {__version__}, {code(f'skymoe {made.command}')}"),
                            ("method", sentence(made.method)),
                            ("seed", "none" if made.seed is None else str(made.seed))])  # fmt: skip
    if made.remarks:
        yield "\n".join(f"- {sentence(remark)}" for remark in made.remarks)
    if made.options:
        yield "Options:"
        yield f"```json\n{json.dumps(dict(made.options), indent=2, ensure_ascii=True)}\n```"


def _facts(spec: ModelSpec) -> Iterator[tuple[str, str]]:
    count, moe = count_parameters(spec), spec.moe
    yield "format", code(spec.architecture.value)
    yield "parameters", f"{count.total:,}" + (f", of which one token uses {count.active:,}" if moe else "")
    if moe is None:
        yield "layers", str(spec.num_layers)
        return
    yield "layers", f"{spec.num_layers}, of which {len(spec.moe_layer_ids)} with experts"
    shared = f", and a shared one of width {moe.shared_ffn_size}" if moe.shared_ffn_size else ""
    yield "experts", f"{moe.num_experts} per layer, of width {moe.ffn_size}; a token uses {moe.top_k}{shared}"
    norm = moe.gate_norm
    told = f"scale {norm.scale:g}, ddof {norm.ddof}, eps {norm.eps:g}" if norm else "none"
    yield "gate normalization", told


def _parents(parents: Sequence[ParentRecord]) -> Iterator[str]:
    yield "## Made from" if parents else ""
    for parent in parents:
        yield f"{code(parent.name)}: {parent.architecture}, {parent.parameters:,} parameters"
        shown = list(parent.sha256.items())[:_MAX_FILES]
        rows = [(code(name), code(digest)) for name, digest in shown]
        more = len(parent.sha256) - len(shown)
        yield _table(("file", "SHA-256"), rows) + (f"\n\n{more} more in `skymoe.json`." if more else "")
        if parent.unread:
            names = ", ".join(code(name, 60) for name in list(parent.unread)[:_MAX_FILES])
            yield f"Fields of its config.json that have no effect here, left behind (see `skymoe.json`): {names}"


def _receipt(receipt: Receipt) -> Iterator[str]:
    yield "## Receipt"
    verdict = "**Exact**" if receipt.exact else "**Not exact**"
    yield f"{verdict}: {sentence(receipt.reason)}."
    yield _table(("figure", "value"), _figures(receipt))
    if receipt.exports:
        yield "Exports (`skymoe export`) of this model:"
        rows = [
            (
                code(each.format),
                "exact" if each.exact else "approximate" if each.carries else "no",
                sentence(each.reason),
            )
            for each in receipt.exports
        ]
        yield _table(("format", "", "remark"), rows)


def _figures(receipt: Receipt) -> Iterator[tuple[str, str]]:
    yield "compared", sentence(receipt.computed)
    yield "on", f"{sentence(receipt.tokens)}; seed {receipt.seed}"
    if receipt.max_abs_dlogit is not None:
        scale = "" if receipt.max_abs_logit is None else f" (largest logit {receipt.max_abs_logit:.4g})"
        yield "largest difference of a logit", f"{receipt.max_abs_dlogit:.3g}{scale}"
    if receipt.kl is not None:
        yield "KL(parent, this), nats per token", f"{receipt.kl:.3g}"
    if receipt.reference_loss is not None and receipt.loss is not None:
        yield "loss, nats per token: parent, this", f"{receipt.reference_loss:.6f}, {receipt.loss:.6f}"
    if receipt.reference_perplexity is not None and receipt.perplexity is not None:
        yield "perplexity: parent, this", f"{receipt.reference_perplexity:.6g}, {receipt.perplexity:.6g}"
    if receipt.top1_agreement is not None:
        yield "same likeliest next token", f"{100 * receipt.top1_agreement:.1f} %"
    if receipt.num_experts and receipt.max_abs_dlogit is not None:
        yield "experts that some token reached", f"{receipt.experts_reached:,} of {receipt.num_experts:,}"


def _loading(spec: ModelSpec) -> Iterator[str]:
    yield "## Load it"
    ours = 'import skymoe\n\nmodel = skymoe.load("DIR")  # model(tokens) gives logits'
    if spec.architecture in (Architecture.SKYWORK, Architecture.SKYWORK_MOE):
        yield f"```python\n{ours}\n```"
        yield "transformers has no class of this name. `skymoe export DIR OUT --format ...` writes other formats."
        return
    is_own = spec.architecture is Architecture.SKYMOE
    option = ", trust_remote_code=True" if is_own else ""
    theirs = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("DIR", dtype="auto"{option})\n'
        'tokenizer = AutoTokenizer.from_pretrained("DIR")'
    )
    yield f"```python\n{theirs}\n```"
    if is_own:
        yield "Where skymoe is installed, `import skymoe` before it makes `trust_remote_code` unnecessary."
    yield f"or\n\n```python\n{ours}\n```"
    remote = " --trust-remote-code`, or without the option where skymoe is installed" if is_own else "`"
    yield f"vLLM: `vllm serve DIR{remote}."


def _licence(made: Made, licence_files: Sequence[str]) -> Iterator[str]:
    yield "## Licence"
    yield "The weights are derived from those of the parents; the parents' terms go on to apply."
    for parent in made.parents:
        licence = parent.licence
        said = " ".join(code(part) for part in (licence.identifier, licence.name, licence.link) if part)
        yield f"- {code(parent.name)}: {said or 'no licence was found in its directory; ask whoever made it'}"
    if any(parent.licence.is_skywork for parent in made.parents):
        yield (
            "The Skywork Community License applies to weights derived from Skywork models, these included: "
            "pass it on with them."
        )
    if licence_files:
        yield f"Licence files, as the parents have them: {', '.join(code(name) for name in licence_files)}."


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
