"""The files beside the weights: byte for byte, bounded, nothing from outside; and the record of what was done."""

from __future__ import annotations

import hashlib
import json
import os
import re

import pytest

from skymoe.base.dtype import DType
from skymoe.base.errors import FormatError
from skymoe.convert.documents import licences, write_documents, write_record
from skymoe.convert.exactness import Exactness
from skymoe.convert.identity import FileHashes
from skymoe.convert.licence import Licence, find_licence
from skymoe.convert.made import Made, model_name, provenance, record_parent
from skymoe.convert.parents import open_parent
from skymoe.convert.receipt import measure
from skymoe.spec.hf import spec_from_directory
from skymoe.spec.model import Architecture
from skymoe.weights.companions import licence_names, tokenizer_names

TRAVELLING = {
    "tokenizer.json": b'{"a":\r\n1}',
    "tokenizer_config.json": b"{}",
    "tokenizer.model": bytes(range(256)),
    "qwen.tiktoken": b"IQ== 0\n",
    "chat_template.jinja": b"{{ x }}\r\n",
    "additional_chat_templates/tool_use.jinja": b"{% if y %}",
    "generation_config.json": b'{"temperature": 0.70, "top_p":0.9}',
    "LICENSE": b"terms\r\n",
    "Some Community License.pdf": b"%PDF-\xff",
    "NOTICE.txt": b"notice",
    "USE_POLICY.md": b"be kind",
}
LEFT = {
    "README.md": b"# theirs", "evil.py": b"x", "tokenization_x.py": b"x", "rng_state.pth": b"x", "license.py": b"x",
    "additional_chat_templates/x.py": b"x", ".LICENSE": b"x", "optimizer.pt": b"x", "LICENSE.exe": b"x",
}  # fmt: skip


@pytest.fixture
def parent(oracle, tmp_path):
    path = oracle.make(tmp_path / "parent", "llama")
    (path / "additional_chat_templates").mkdir()
    for name, content in {**TRAVELLING, **LEFT}.items():
        (path / name).write_bytes(content)
    return path


def written(parent, tmp_path, **options):
    out = tmp_path / "out"
    out.mkdir()
    write_documents(out, spec_from_directory(parent), DType.BFLOAT16, [parent], **options)
    return out


def names(directory):
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def test_everything_travels_byte_for_byte_and_nothing_else(parent, tmp_path):
    out = written(parent, tmp_path)
    assert names(out) == {*TRAVELLING, "config.json"}
    assert {name: (out / name).read_bytes() for name in TRAVELLING} == TRAVELLING


def test_the_config_is_that_of_the_target(parent, tmp_path):
    quantized = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    out = written(parent, tmp_path, extra_config=quantized)
    config = json.loads((out / "config.json").read_text())
    assert (config["dtype"], config["model_type"]) == ("bfloat16", "llama")
    assert config["quantization_config"] == quantized["quantization_config"]


def test_without_a_generation_config_the_special_tokens_are_written(parent, tmp_path):
    (parent / "generation_config.json").unlink()
    out = written(parent, tmp_path)
    assert set(json.loads((out / "generation_config.json").read_text())) <= {"bos_token_id", "eos_token_id"}


def test_transformers_finds_all_templates_and_the_generation_config(parent, tmp_path, oracle):
    """What transformers 5 writes is what is copied."""
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "qwen.tiktoken"):
        (parent / name).unlink()
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    templates = {"default": "{{ 1 }}", "rag": "{{ 2 }}", "tool_use": "{{ 3 }}"}
    PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=templates).save_pretrained(parent)
    out = written(parent, tmp_path)
    loaded = AutoTokenizer.from_pretrained(out)
    assert loaded("a b a").input_ids == [0, 1, 0]
    assert loaded.chat_template == templates
    assert GenerationConfig.from_pretrained(out).top_p == 0.9


def test_a_snapshot_of_the_cache(parent, tmp_path):
    """In the Hugging Face cache every file is a link to `blobs/`, in folders too."""
    repository = tmp_path / "models--some-org--a-model"
    snapshot, blobs = repository / "snapshots" / "abc123", repository / "blobs"
    (snapshot / "additional_chat_templates").mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate(sorted(names(parent))):
        (parent / name).rename(blobs / str(number))
        depth = name.count("/") + 2
        (snapshot / name).symlink_to("../" * depth + f"blobs/{number}")
    out = written(snapshot, tmp_path)
    assert {name: (out / name).read_bytes() for name in TRAVELLING} == TRAVELLING
    assert model_name(snapshot) == "some-org/a-model"
    assert model_name(out) == "out"


@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "generation_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("kind", ["link out", "dangling", "circle", "fifo", "directory", "too large"])
def test_hostile_files_are_refused(name, kind, parent, tmp_path):
    (tmp_path / "secret").write_text("secret")
    path = parent / name
    path.unlink()
    match kind:
        case "link out":
            path.symlink_to(tmp_path / "secret")
        case "dangling":
            path.symlink_to("nowhere")
        case "circle":
            path.symlink_to(name)
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "too large":
            with path.open("wb") as file:
                file.truncate(256 * 2**20 + 1)
    with pytest.raises(FormatError, match=re.escape(name)):
        written(parent, tmp_path)
    assert not any("secret" in file.read_text("latin1") for file in (tmp_path / "out").rglob("*") if file.is_file())


@pytest.mark.parametrize("kind", ["folder is a link", "file is a link", "fifo", "folder is a file"])
def test_hostile_templates_are_refused(kind, parent, tmp_path):
    folder, outside = parent / "additional_chat_templates", tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.jinja").write_text("secret")
    if kind.startswith("folder"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    match kind:
        case "folder is a link":
            folder.symlink_to(outside)
        case "file is a link":
            (folder / "x.jinja").symlink_to(outside / "secret.jinja")
        case "fifo":
            os.mkfifo(folder / "x.jinja")
        case "folder is a file":
            folder.write_text("x")
    with pytest.raises(FormatError, match="additional_chat_templates"):
        written(parent, tmp_path)
    assert not list((tmp_path / "out").rglob("*secret*"))


def test_names_that_are_no_plain_names_are_passed_over(parent):
    folder = parent / "additional_chat_templates"
    for name in ("a b.jinja", "-rf.jinja", "x\n.jinja", "\u202ex.jinja", "x" * 150 + ".jinja", "\x1b[31m.jinja"):
        (folder / name).write_text("x")
    (parent / "LICENSE\nMIT").write_text("x")
    (parent / ("LICENSE " + "x" * 130)).write_text("x")
    assert [name for name in tokenizer_names(parent) if "/" in name] == ["additional_chat_templates/tool_use.jinja"]
    assert set(licence_names(parent)) == {"LICENSE", "NOTICE.txt", "Some Community License.pdf", "USE_POLICY.md"}


def test_thousands_of_licences_are_refused(tmp_path):
    for number in range(65):
        (tmp_path / f"LICENSE-{number}").touch()
    with pytest.raises(FormatError, match="65"):
        licence_names(tmp_path)


def test_licences_of_several_parents(tmp_path):
    contents = [{"LICENSE": b"one", "NOTICE": b"n"}, {"LICENSE": b"two"}, {"LICENSE": b"one"}, {"LICENSE": b"two"}]
    for number, files in enumerate(contents):
        (tmp_path / str(number)).mkdir()
        for name, content in files.items():
            (tmp_path / str(number) / name).write_bytes(content)
    found = licences([tmp_path / str(number) for number in range(4)])
    assert found == {"LICENSE": b"one", "NOTICE": b"n", "LICENSE.parent2": b"two"}


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\nx", ("apache-2.0", "", "")),
        ("---\r\nlicense:\r\n- mit\r\n- other\r\n---\r\n", ("mit", "", "")),
        ("---\nlicense: other\nlicense_name: foo-1\nlicense_link: https://a.org/b\n---", ("other", "foo-1", "https://a.org/b")),
        ("---\nlicense: other\nlicense_link: javascript:alert(1)\n---", ("other", "", "")),
        ("---\nlicense: <script>\nlicense_name: 'a`b'\n---", ("other", "", "")),
        ("---\nlicense: {a: b}\n---", ("other", "", "")),
        ("---\nlicense: !!python/object/apply:os.system [x]\n---", ("other", "", "")),
        ("---\na: &a [x, x]\nb: &b [*a, *a]\nlicense: mit\n" + "---", ("mit", "", "")),
        ("---\n" + "[" * 5000 + "\n---", ("other", "", "")),
        ("no front matter", ("other", "", "")),
        ("---\nlicense: mit\n", ("other", "", "")),
        ("\xff\xfe\x00", ("other", "", "")),
    ],
)  # fmt: skip
def test_the_licence_that_a_parents_card_names(card, expected, tmp_path):
    (tmp_path / "LICENSE").touch()
    (tmp_path / "README.md").write_bytes(card.encode("latin1"))
    found = find_licence(tmp_path, Architecture.LLAMA)
    assert (found.identifier, found.name, found.link) == expected


def test_a_licence_of_skywork(tmp_path):
    assert find_licence(tmp_path, Architecture.LLAMA) == Licence()
    found = find_licence(tmp_path, Architecture.SKYWORK)
    assert (found.identifier, found.name, found.is_skywork) == ("other", "skywork-community-license", True)
    (tmp_path / "skymoe.json").write_text("{}")  # `skymoe export --format skywork` gives Skywork's names to any model
    assert find_licence(tmp_path, Architecture.SKYWORK) == Licence()
    card = "---\nlicense: other\nlicense_name: skywork-community-license\n---\n"  # as our own cards say it
    (tmp_path / "README.md").write_text(card)
    assert find_licence(tmp_path, Architecture.MIXTRAL).is_skywork


@pytest.mark.parametrize("kind", ["fifo", "link out", "huge"])
def test_a_hostile_card_says_nothing(kind, tmp_path):
    model, path = tmp_path / "m", tmp_path / "m" / "README.md"
    model.mkdir()
    (tmp_path / "other.md").write_text("---\nlicense: mit\n---\n")
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "link out":
            path.symlink_to(tmp_path / "other.md")
        case "huge":
            path.write_bytes(b"---\nlicense: mit\n---\n" + bytes(5 * 2**20))
    assert find_licence(model, Architecture.LLAMA) == Licence()


def test_the_record(parent, tmp_path):
    config = json.loads((parent / "config.json").read_text())
    (parent / "config.json").write_text(json.dumps({**config, "unheard_of": [1, 2]}))
    out = written(parent, tmp_path)
    (out / "model.safetensors").write_bytes((parent / "model.safetensors").read_bytes())
    with open_parent(parent) as opened, FileHashes([parent]) as hashes:
        record = record_parent(opened, *hashes.result())
        assert record == record_parent(opened)
    made = Made("export", "to llama", (record,), options={"format": "llama"}, seed=4, remarks=("a note",))
    receipt = measure(parent, out, Exactness(True, "copied"), num_tokens=8, seed=4)
    write_record(out, spec_from_directory(out), made, receipt)
    assert {"README.md", "receipt.json", "skymoe.json"} <= names(out)
    saved = json.loads((out / "skymoe.json").read_text())
    assert saved == provenance(made)
    assert (saved["made_by"], saved["method"], saved["seed"]) == ("export", "to llama", 4)
    (told,) = saved["parents"]
    assert (told["name"], told["architecture"]) == ("parent", "llama")
    assert told["config_fields_left_behind"]["unheard_of"] == [1, 2]
    for name in ("config.json", "model.safetensors"):
        assert told["sha256"][name] == hashlib.sha256((parent / name).read_bytes()).hexdigest()
    assert json.loads((out / "receipt.json").read_text())["exact"] is True
    everything = "".join((out / name).read_text() for name in ("README.md", "receipt.json", "skymoe.json"))
    assert str(tmp_path) not in everything


def test_the_same_inputs_give_the_same_bytes(parent, tmp_path):
    with open_parent(parent) as opened:
        made, spec = Made("export", "again", (record_parent(opened),)), opened.spec
    contents = []
    for name in ("a", "b"):
        out = tmp_path / name
        out.mkdir()
        write_documents(out, spec, DType.FLOAT32, [parent])
        write_record(out, spec, made, None)
        contents.append({file: (out / file).read_bytes() for file in names(out)})
    assert contents[0] == contents[1]
    assert "receipt.json" not in contents[0]
