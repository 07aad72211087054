from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from skymoe.base.errors import ConfigError
from skymoe.base.log import logger
from skymoe.data import corpus as corpus_module
from skymoe.data.corpus import DOMAINS, DemoCorpus, build_demo_corpus, hold_out
from skymoe.data.evaluation import EvaluationWindows
from skymoe.data.indexed import IndexedDataset
from skymoe.data.interpreter_text import CODE, DOCS, PROSE, Document, read_interpreter_text
from skymoe.data.sampler import Mixture, Source, batch
from skymoe.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> DemoCorpus:
    out = tmp_path_factory.mktemp("corpus") / "c"
    return build_demo_corpus(out, kind="synthetic", vocab_size=600, max_bytes_per_domain=120_000)


def decoded(corpus: DemoCorpus, prefix: Path) -> list[str]:
    tokenizer, data = load_tokenizer(corpus.tokenizer_dir), IndexedDataset(prefix)
    return [tokenizer.decode(data.document(i).tolist()) for i in range(data.num_documents)]


def test_three_domains_two_sides(synthetic: DemoCorpus) -> None:
    assert tuple(synthetic.train) == tuple(synthetic.valid) == DOMAINS
    assert synthetic.kind == "synthetic" and synthetic.vocab_size == 600 and synthetic.bytes_per_token > 2
    for name in DOMAINS:
        report = synthetic.domains[name]
        share = report.valid.text_bytes / report.text_bytes
        assert 0.02 < share < 0.09
        assert report.train.documents + report.valid.documents == report.documents
        IndexedDataset(synthetic.train[name]).verify()
        IndexedDataset(synthetic.valid[name]).verify()
    written = json.loads((synthetic.tokenizer_dir.parent / "corpus.json").read_text())
    assert written["domains"]["code"]["sha256"] == synthetic.domains["code"].sha256


def test_it_is_ready_to_train_on(synthetic: DemoCorpus) -> None:
    sources = [Source(synthetic.train[name], weight, name) for name, weight in zip(DOMAINS, (7, 2, 1), strict=True)]
    mixture = Mixture(sources, sequence_length=32, seed=0, vocab_size=synthetic.vocab_size)
    assert batch(mixture, 0, 10).tokens_BT.shape == (10, 32)
    assert len(EvaluationWindows(synthetic.valid["docs"], 32, vocab_size=synthetic.vocab_size)) > 10


def test_the_same_seed_gives_the_same_bytes(synthetic: DemoCorpus, tmp_path: Path) -> None:
    options = {"kind": "synthetic", "vocab_size": 600, "max_bytes_per_domain": 120_000}
    again = build_demo_corpus(tmp_path / "again", **options)
    other = build_demo_corpus(tmp_path / "other", seed=1, **options)
    for name in DOMAINS:
        one, same, new = (IndexedDataset(c.train[name]).fingerprint for c in (synthetic, again, other))
        assert one == same != new


def test_nothing_of_a_held_out_source_file_is_in_training(tmp_path: Path) -> None:
    size = 400_000
    texts = read_interpreter_text(size)
    if not texts[CODE]:
        pytest.skip("this Python carries no sources")
    corpus = build_demo_corpus(tmp_path / "c", vocab_size=512, max_bytes_per_domain=size)
    assert corpus.kind == "stdlib"
    held_out = hold_out([*texts[DOCS], *texts[CODE]], 0)
    for name in (DOCS, CODE):
        by_text = {document.text: document.group for document in texts[name]}
        assert {by_text[text] for text in decoded(corpus, corpus.train[name])} & held_out == set()
        assert {by_text[text] for text in decoded(corpus, corpus.valid[name])} <= held_out
    assert set(decoded(corpus, corpus.train[PROSE])).isdisjoint(decoded(corpus, corpus.valid[PROSE]))


def test_hold_out_stays_within_the_share() -> None:
    documents = [Document(f"g{i % 90}", "x" * (i * 37 % 200)) for i in range(300)]
    chosen = hold_out(documents, 3, share=0.1)
    size = sum(len(d.text) for d in documents)
    assert 0.07 * size < sum(len(d.text) for d in documents if d.group in chosen) <= 0.1 * size
    assert chosen != hold_out(documents, 4, share=0.1)


def test_a_python_without_sources_gets_synthetic_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logger, "propagate", True)  # a command line that ran before may have turned it off
    monkeypatch.setattr(corpus_module, "read_interpreter_text", lambda _: {name: [] for name in DOMAINS})
    corpus = build_demo_corpus(tmp_path / "c", vocab_size=300, max_bytes_per_domain=50_000)
    assert corpus.kind == "synthetic" and "using synthetic text" in caplog.text


def test_too_little_text_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_bytes_per_domain"):
        build_demo_corpus(tmp_path / "c", kind="synthetic", vocab_size=300, max_bytes_per_domain=500)
    assert list(tmp_path.iterdir()) == []


def test_the_room_imports_no_torch() -> None:
    modules = [f"skymoe.data.{path.stem}" for path in Path(corpus_module.__file__).parent.glob("[a-z]*.py")]
    code = f"import sys, {', '.join(modules)}; print(*{{name.split('.')[0] for name in sys.modules}})"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"torch", "tokenizers", "pyarrow", "transformers"} & set(loaded) and "skymoe" in loaded
