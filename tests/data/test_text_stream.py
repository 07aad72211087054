from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skymoe.data.text_stream import TextStream, for_terminal

tokenizers = pytest.importorskip("tokenizers")


@functools.cache
def byte_level() -> tokenizers.Tokenizer:
    """A byte-level BPE with few merges: most characters outside ASCII are several tokens."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the world, die Welt, le monde: 世界 🌍 ñandú"] * 5, trainer)
    return tokenizer


@functools.cache
def word_start() -> tokenizers.Tokenizer:
    """Llama's kind: ▁ for a space, a decoder that takes the first space away, bytes as a fallback."""
    vocab = {"<unk>": 0, "▁": 1, "a": 2, "b": 3, "▁a": 4, **{f"<0x{i:02X}>": 5 + i for i in range(256)}}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, [("▁", "a")], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    decoders = tokenizers.decoders
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def stream(tokenizer: tokenizers.Tokenizer, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    decoder = TextStream(tokenizer.decode, prompt or [])
    return [*(decoder.push(token) for token in ids), decoder.finish()]


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=120))
def test_any_text_comes_back_and_no_piece_has_half_a_character(text: str) -> None:
    ids = byte_level().encode(text).ids
    pieces = stream(byte_level(), ids)
    assert "".join(pieces) == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 289), max_size=150))
def test_any_tokens_stream_to_what_they_decode_to(ids: list[int]) -> None:
    ids = [token for token in ids if token < byte_level().get_vocab_size()]
    assert "".join(stream(byte_level(), ids)) == byte_level().decode(ids)


def test_a_character_of_four_bytes_leaves_with_its_last_byte() -> None:
    ids = byte_level().encode("𝄞").ids
    assert len(ids) == 4
    assert stream(byte_level(), ids) == ["", "", "", "𝄞", ""]


def test_an_unfinished_character_leaves_at_the_end() -> None:
    ids = byte_level().encode("ok 𝄞").ids[:-1]
    assert "".join(stream(byte_level(), ids)) == "ok \N{REPLACEMENT CHARACTER}"


def test_text_is_not_held_back_forever_by_bytes_that_are_no_text() -> None:
    bad = byte_level().encode("é").ids[0]
    pieces = stream(byte_level(), [bad] * 30)
    assert sum(map(len, pieces[:-1])) >= 25 and "".join(pieces) == byte_level().decode([bad] * 30)


def test_the_space_after_the_prompt_is_kept() -> None:
    prompt, ids = word_start().encode("b").ids, [4, 3, 4]
    assert "".join(stream(word_start(), ids, prompt)) == " ab a"


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab é世🙂", min_size=1, max_size=200))
def test_byte_fallback_tokens_stream_too(text: str) -> None:
    whole = word_start().encode(text).ids
    assert "".join(stream(word_start(), whole[1:], whole[:1])) == word_start().decode(whole)[
        len(word_start().decode(whole[:1])) :
    ]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 260), min_size=40, max_size=250), st.integers(0, 200))
def test_any_bytes_stream_after_any_prompt(ids: list[int], cut: int) -> None:
    """Byte-level decoding is exact wherever the window is cut: all that comes after whole characters of the prompt."""
    ids = byte_level().encode("Prompt. ").ids + ids
    prompt, rest = ids[: 8 + cut], ids[8 + cut :]
    while prompt and byte_level().decode(prompt).endswith("\N{REPLACEMENT CHARACTER}"):
        rest, prompt = [prompt[-1], *rest], prompt[:-1]
    expected = byte_level().decode(prompt + rest)[len(byte_level().decode(prompt)) :]
    assert "".join(stream(byte_level(), rest, prompt)) == expected


@pytest.mark.parametrize("tokenizer", [byte_level, word_start])
def test_the_window_stays_short_whatever_the_tokens_are(tokenizer: Callable[[], tokenizers.Tokenizer]) -> None:
    """A client can ask for broken characters without end; each token must cost the same."""
    library = tokenizer()
    bad = library.encode("é").ids[-1]
    sizes: list[int] = []

    def decode(ids: Sequence[int]) -> str:
        sizes.append(len(ids))
        return str(library.decode(list(ids)))

    decoder = TextStream(decode, [bad] * 5000)
    pieces = [decoder.push(bad) for _ in range(1000)]
    assert max(sizes) <= 200 and sum(sizes) / len(pieces) < 120
    assert "".join([*pieces, decoder.finish()]) == "\N{REPLACEMENT CHARACTER}" * 1000


def test_control_characters_are_made_visible() -> None:
    assert for_terminal("a\x1b[2J\x07\tb\n\u202e é") == "a\\x1b[2J\\x07\tb\n\\u202e é"
