from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skymoe.base.errors import ConfigError, FormatError
from skymoe.data.token_bytes import token_byte_lengths
from skymoe.data.tokenizer import END_OF_TEXT, PAD, TextTokenizer, load_tokenizer, train_tokenizer

AWKWARD = "h\u00e9llo  w\u00f6rld\n\n\t\u4e2d\u6587 \U0001f600 x  \r\n don't <|endoftext|> <|pad|>"


def test_transformers_loads_what_we_save(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path / "t")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "t")
    assert (theirs.eos_token, theirs.eos_token_id, theirs.pad_token, theirs.pad_token_id) == (END_OF_TEXT, 0, PAD, 1)
    assert len(theirs) == tokenizer.vocab_size and theirs.bos_token is None
    text = AWKWARD.replace("<|endoftext|> <|pad|>", "")
    ids = theirs(text).input_ids
    assert [*ids, 0] == tokenizer.encode_documents([text], "int64")[0].tolist()
    assert theirs.decode(ids) == text
    assert theirs("a<|endoftext|>").input_ids[-1] == 0


@given(st.text(max_size=60))
@settings(max_examples=80, deadline=None)
def test_every_text_comes_back_and_its_bytes_add_up(tokenizer: TextTokenizer, lengths_dir: Path, text: str) -> None:
    ids = tokenizer.encode_documents([text], "int64")[0]
    assert ids[-1] == tokenizer.eos_id and tokenizer.decode(ids.tolist()) == text
    assert token_byte_lengths(lengths_dir)[ids].sum() == len(text.encode())


@pytest.fixture(scope="module")
def lengths_dir(tokenizer: TextTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("t")
    tokenizer.save(directory)
    return directory


def test_text_cannot_spell_the_end_of_its_document(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode_documents([AWKWARD], "int64")[0].tolist()
    assert ids.count(tokenizer.eos_id) == 1 and 1 not in ids
    assert tokenizer.decode(ids) == AWKWARD


def test_training_is_repeatable_and_bounded() -> None:
    texts = [f"word{i % 17} and {chr(97 + i % 26) * (i % 5)} then {i * i}\n" for i in range(200)]
    one, other = train_tokenizer(texts, 290), train_tokenizer(iter(texts), 290)
    assert one.json == other.json and one.sha256 == other.sha256 and one.vocab_size == 290
    with pytest.raises(ConfigError, match="256 bytes"):
        train_tokenizer(texts, 257)


def test_a_saved_tokenizer_loads_as_it_was(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    tokenizer.save(tmp_path / "a")
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ x }}")
    (tmp_path / "a" / "model.safetensors").write_text("not a tokenizer file")
    again = load_tokenizer(tmp_path / "a")
    again.save(tmp_path / "b")
    assert (again.sha256, again.eos_id, again.vocab_size) == (tokenizer.sha256, 0, tokenizer.vocab_size)
    assert {path.name for path in (tmp_path / "b").iterdir()} == {
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_end_token_is_found(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    tokenizer.save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": {"content": PAD}}))
    assert load_tokenizer(tmp_path).eos_id == 1
    assert load_tokenizer(tmp_path, eos_token="a").eos_token == "a"
    config.unlink()
    assert load_tokenizer(tmp_path / "tokenizer.json").eos_id == 0
    with pytest.raises(FormatError, match="no end token '</s>'"):
        load_tokenizer(tmp_path, eos_token="</s>")


def test_padding_and_truncation_in_the_file_are_not_applied(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    tokenizer.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).decode(load_tokenizer(tmp_path).encode(AWKWARD)) == AWKWARD


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"model": {}}', '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}',
     '{"a": 1, "a": 2}', '{"model": NaN}'],
)  # fmt: skip
def test_broken_tokenizers_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        token_byte_lengths(tmp_path)


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "//////////8="}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAGFiY2Q="}},
        {"post_processor": {"type": "TemplateProcessing", "pair": [], "special_tokens": {},
                            "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}]}},
        {"decoder": {"type": "Strip", "content": "a", "start": 99, "stop": 99}},
        {"model": {"type": "WordLevel", "vocab": {"a": 0, "</s>": 1}, "unk_token": "zz"}},
    ],
)  # fmt: skip
def test_panics_of_the_library_are_errors(tmp_path: Path, parts: dict[str, object]) -> None:
    """A panic of its Rust code is no `Exception`; it must not pass by those who handle one."""
    names = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    model = {"type": "BPE", "vocab": {"a": 0, "</s>": 1}, "merges": []}
    whole = {"version": "1.0", "added_tokens": [], "model": model, **dict.fromkeys(names), **parts}
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(FormatError, match=r"not a tokenizer|charsmap is cut off|cannot be (tokenized|made text)"):
        tokenizer = load_tokenizer(tmp_path, eos_token="</s>")
        tokenizer.encode("h\u00e9llo a \u2581")
        tokenizer.encode_documents(["h\u00e9llo a \u2581"], "int64")
        tokenizer.decode([0, 1])


def test_links_out_of_the_directory_are_refused(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    tokenizer.save(tmp_path / "outside")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "tokenizer.json").symlink_to("../outside/tokenizer.json")
    with pytest.raises(FormatError, match="leads out"):
        load_tokenizer(tmp_path / "t")
    assert load_tokenizer(tmp_path / "t" / "tokenizer.json").vocab_size == tokenizer.vocab_size  # a file the user named


def test_a_missing_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="save_pretrained"):
        load_tokenizer(tmp_path)
    with pytest.raises(FormatError, match="no such file"):
        load_tokenizer(tmp_path / "none.json")
