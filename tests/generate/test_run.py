from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
import torch

pytest.importorskip("tokenizers")

from skymoe.base.dtype import DType
from skymoe.base.errors import ConfigError, FormatError, MachineError
from skymoe.data.tokenizer import train_tokenizer
from skymoe.generate.config import GenerateConfig
from skymoe.generate.run import run
from skymoe.model.init import initialize
from skymoe.model.save import save_pretrained
from skymoe.model.transformer import Transformer
from skymoe.spec.model import Architecture, ModelSpec, MoESpec

SPEC = ModelSpec(
    architecture=Architecture.MIXTRAL, vocab_size=300, hidden_size=24, num_layers=2, ffn_size=30, num_heads=3,
    num_kv_heads=1, head_dim=8, max_position=48, init_std=0.2, moe=MoESpec(num_experts=4, top_k=2, ffn_size=20),
)  # fmt: skip


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    train_tokenizer(["the quick brown fox, der schnelle Fuchs: 狐 🦊"] * 3, 300).save(folder / "tokenizer")
    model = initialize(Transformer(SPEC), seed=3)
    save_pretrained(model, folder / "model", tokenizer_from=folder / "tokenizer")
    return folder / "model"


def config(model: Path, prompt: str = "the fox 🦊", **changes: object) -> GenerateConfig:
    return GenerateConfig(model=model, prompt=prompt, **changes)  # type: ignore[arg-type]


def test_the_streamed_pieces_are_the_text_and_a_seed_repeats_it(model_dir: Path) -> None:
    pieces: list[str] = []
    first = run(config(model_dir, max_tokens=20, ignore_eos=True, seed=4), write=pieces.append)
    assert "".join(pieces) == first.text and len(first.token_ids) == 20 and first.stop == "length"
    assert first.tokens_per_s > 0 and first.prefill_seconds > 0
    again = run(config(model_dir, max_tokens=20, ignore_eos=True, seed=4))
    other = run(config(model_dir, max_tokens=20, ignore_eos=True, seed=5))
    assert again.token_ids == first.token_ids != other.token_ids


def test_without_a_seed_the_report_names_the_one_it_took(model_dir: Path) -> None:
    report = run(config(model_dir, max_tokens=6, seed=None))
    assert run(config(model_dir, max_tokens=6, seed=report.seed)).token_ids == report.token_ids


def test_it_stops_at_the_end_of_text(model_dir: Path, tmp_path: Path) -> None:
    greedy = run(config(model_dir, max_tokens=12, temperature=0.0, ignore_eos=True)).token_ids
    spec = dataclasses.replace(SPEC, eos_ids=(greedy[5],))
    save_pretrained(initialize(Transformer(spec), seed=3), tmp_path / "m", tokenizer_from=model_dir)
    report = run(config(tmp_path / "m", max_tokens=12, temperature=0.0))
    assert report.stop == "eos" and report.token_ids == greedy[: greedy.index(greedy[5])]


def test_the_context_ends_the_text_and_a_longer_prompt_is_refused(model_dir: Path) -> None:
    report = run(config(model_dir, max_tokens=500, ignore_eos=True))
    assert report.stop == "context" and len(report.prompt_ids) + len(report.token_ids) == SPEC.max_position
    with pytest.raises(ConfigError, match="context is 48"):
        run(config(model_dir, prompt="狐" * 60))


def test_an_empty_prompt_begins_a_new_document(model_dir: Path) -> None:
    assert run(config(model_dir, prompt="", max_tokens=3)).prompt_ids == (0,)


def test_the_prompt_may_come_from_standard_input(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("the fox\n"))
    assert run(config(model_dir, prompt="-", max_tokens=2)).prompt == "the fox\n"


def test_another_format_can_be_asked_for(model_dir: Path) -> None:
    assert len(run(config(model_dir, max_tokens=4, dtype=DType.BFLOAT16, ignore_eos=True)).token_ids) == 4


def test_what_cannot_be_used_is_refused(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        run(config(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="not a torch device"):
        run(config(model_dir, device="abacus"))
    if not torch.cuda.is_available():
        with pytest.raises(MachineError):
            run(config(model_dir, device="cuda:0"))
    save_pretrained(initialize(Transformer(SPEC), seed=3), tmp_path / "bare")
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        run(config(tmp_path / "bare"))
    save_pretrained(
        initialize(Transformer(dataclasses.replace(SPEC, vocab_size=90)), seed=3),
        tmp_path / "s",
        tokenizer_from=model_dir,
    )
    with pytest.raises(FormatError, match="another model"):
        run(config(tmp_path / "s"))
