from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from skymoe.base.config import read_config
from skymoe.base.errors import ConfigError, FormatError
from skymoe.data.build import hash_share
from skymoe.data.config import BuildConfig, TextUnit
from skymoe.data.indexed import IndexedDataset
from skymoe.data.run import run
from skymoe.data.tokenizer import load_tokenizer


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    paragraphs = [f"Paragraph {i} says {'so ' * (i % 11)}and ends.\n" for i in range(400)]
    (tmp_path / "in" / "a.txt").write_text("\n".join(paragraphs))
    (tmp_path / "in" / "b.jsonl").write_text("".join(json.dumps({"text": p}) + "\n" for p in paragraphs[:50]))
    return tmp_path / "in"


def config_of(corpus: Path, **changes: object) -> BuildConfig:
    settings = {"vocab_size": 300, "validation_share": 0.1, "text_unit": TextUnit.PARAGRAPH, **changes}
    return BuildConfig(inputs=(corpus,), out=corpus.parent / "out", **settings)


def texts_of(prefix: Path, tokenizer_dir: Path) -> list[str]:
    data, tokenizer = IndexedDataset(prefix), load_tokenizer(tokenizer_dir)
    documents = [data.document(i).tolist() for i in range(data.num_documents)]
    assert all(document[-1] == tokenizer.eos_id and tokenizer.eos_id not in document[:-1] for document in documents)
    return [tokenizer.decode(document) for document in documents]


def test_documents_come_back_and_equal_ones_stay_together(corpus: Path) -> None:
    report = run(config_of(corpus))
    train, valid = (texts_of(side.prefix, report.tokenizer_dir) for side in (report.train, report.valid))
    assert set(train + valid) == {f"{part.strip()}\n" for part in (corpus / "a.txt").read_text().split("\n\n")}
    assert len(train) + len(valid) == 450 and 15 < len(valid) < 80
    assert not set(train) & set(valid)
    assert report.train.tokens == IndexedDataset(report.train.prefix).num_tokens
    assert report.train.text_bytes == sum(len(text.encode()) for text in train)
    assert report.vocab_size == 300 and report.notes == () and report.skipped == {} and report.files == 2


def test_the_output_says_how_it_was_made(corpus: Path) -> None:
    report = run(config_of(corpus, name="paragraphs"))
    assert sorted(os.listdir(report.out)) == [
        "report.json", "tokenizer", "train.bin", "train.idx", "train.json", "valid.bin", "valid.idx", "valid.json",
    ]  # fmt: skip
    written = json.loads((report.out / "report.json").read_text())
    assert written["config"]["name"] == "paragraphs" and written["report"]["train"]["tokens"] == report.train.tokens
    sidecar = IndexedDataset(report.train.prefix).sidecar
    assert sidecar is not None and sidecar.name == "paragraphs"
    assert sidecar.tokenizer_sha256 == load_tokenizer(report.tokenizer_dir).sha256
    IndexedDataset(report.train.prefix).verify()


def test_building_is_repeatable(corpus: Path) -> None:
    one = run(config_of(corpus))
    other = run(config_of(corpus).replace(out=corpus.parent / "again"))
    moved = run(config_of(corpus, seed=1).replace(out=corpus.parent / "seed"))
    fingerprints = [IndexedDataset(report.train.prefix).fingerprint for report in (one, other, moved)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_an_existing_tokenizer_is_used_as_it_is(corpus: Path) -> None:
    first = run(config_of(corpus))
    second = run(config_of(corpus, tokenizer=first.tokenizer_dir, eos_token="e").replace(out=corpus.parent / "two"))
    assert load_tokenizer(second.tokenizer_dir).sha256 == load_tokenizer(first.tokenizer_dir).sha256
    data = IndexedDataset(second.train.prefix)
    assert data.document(0)[-1] == load_tokenizer(first.tokenizer_dir, eos_token="e").eos_id != 0


def test_nothing_is_left_of_a_build_that_fails(corpus: Path) -> None:
    (corpus / "c.jsonl").write_text('{"text": "good"}\n{"text": 7}\n')
    with pytest.raises(FormatError, match=r"c\.jsonl:2.*no text under 'text'"):
        run(config_of(corpus))
    assert os.listdir(corpus.parent) == ["in"]


def test_an_existing_output_is_refused_unless_asked(corpus: Path) -> None:
    run(config_of(corpus))
    before = (corpus.parent / "out" / "train.bin").read_bytes()
    with pytest.raises(ConfigError, match="not empty"):
        run(config_of(corpus, seed=1))
    assert (corpus.parent / "out" / "train.bin").read_bytes() == before
    run(config_of(corpus, seed=1, overwrite=True))
    assert (corpus.parent / "out" / "train.bin").read_bytes() != before


def test_one_document_gives_a_note_and_no_validation_file(corpus: Path) -> None:
    (corpus / "b.jsonl").unlink()
    report = run(config_of(corpus, text_unit=TextUnit.FILE, validation_share=1e-9, vocab_size=20_000))
    assert report.valid.prefix is None and not (report.out / "valid.bin").exists()
    assert any("held out" in note for note in report.notes) and any("vocabulary" in note for note in report.notes)


def test_no_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("\n \n")
    with pytest.raises(FormatError, match="no text to train on"):
        run(BuildConfig(inputs=(tmp_path / "x.txt",), out=tmp_path / "out"))
    assert os.listdir(tmp_path) == ["x.txt"]


def test_the_config_reads_as_yaml(tmp_path: Path) -> None:
    recipe = tmp_path / "build.yaml"
    recipe.write_text("inputs: [a.txt, b]\nout: web\nformat: jsonl\nextensions: [.py]\nvalidation_share: '1e-3'\n")
    config = read_config(BuildConfig, recipe, ["vocab_size=4096"])
    assert config.inputs == (Path("a.txt"), Path("b")) and config.format == "jsonl" and config.vocab_size == 4096
    assert config.dataset_name == "web" and config.validation_share == 1e-3
    with pytest.raises(ConfigError, match="text_key"):
        read_config(BuildConfig, recipe, ["text_kye=body"])
    with pytest.raises(ConfigError, match="begin with a dot"):
        read_config(BuildConfig, recipe, ["extensions=[py]"])


def test_the_share_held_out_is_the_share_asked_for() -> None:
    shares = [hash_share(str(i), "validation", 0) for i in range(20_000)]
    assert sum(share < 0.05 for share in shares) == pytest.approx(1000, abs=120)
