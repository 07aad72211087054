from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from skymoe.data.tokenizer import TextTokenizer
from skymoe.engine.output import Finish, TokenLogprobs, TokenOutput
from skymoe.engine.params import SamplingParams
from skymoe.engine.text import StopFinder, TextDelta, TextOutput
from skymoe.engine.token_text import TokenTexts, chat_logprobs, completion_logprobs

tokenizers = pytest.importorskip("tokenizers")


def wrapped(backend: tokenizers.Tokenizer, eos: str) -> TextTokenizer:
    backend.encode_special_tokens = True
    return TextTokenizer(backend, eos, backend.token_to_id(eos), backend.to_str().encode())


@functools.cache
def byte_level() -> TextTokenizer:
    """A byte-level BPE with few merges: most characters outside ASCII are several tokens."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, show_progress=False, special_tokens=["<|end|>"]
    )
    backend.train_from_iterator(["the world, die Welt, le monde: 世界 🌍 ñandú STOP. the end"] * 5, trainer)
    return wrapped(backend, "<|end|>")


@functools.cache
def byte_fallback() -> TextTokenizer:
    """Llama's kind: ▁ for a space, a decoder that takes the first space away, bytes as a fallback."""
    pieces = ["<unk>", "</s>", "▁", "a", "b", "▁a", "ab", *(f"<0x{i:02X}>" for i in range(256))]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("a", "b")]
    model = tokenizers.models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    decoders = tokenizers.decoders
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "</s>"])
    return wrapped(backend, "</s>")


def outputs(ids: Sequence[int], finish: Finish = Finish.LENGTH) -> list[TokenOutput]:
    last = len(ids) - 1
    return [TokenOutput(request_id="r", token_id=t, finish=finish if i == last else None) for i, t in enumerate(ids)]


def deltas(output: TextOutput, news: Sequence[TokenOutput]) -> list[TextDelta]:
    """As a server reads them: until the first delta that says the end."""
    found = []
    for each in news:
        found.append(output.push(each))
        if found[-1].finish is not None:
            break
    return found


def text_of(found: Sequence[TextDelta]) -> str:
    return "".join(delta.text for delta in found)


def first_stop(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """The specification: character by character, the first stop string that is complete, the longest of those."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


# ---- stop strings


@settings(max_examples=400, deadline=None)
@given(
    pieces=st.lists(st.text(alphabet="abc", max_size=4), max_size=12),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4, unique=True),
)
@example(pieces=["ab", "cd"], stops=["abcd", "bc"])
@example(pieces=["aab"], stops=["ab", "aab"])
@example(pieces=["a", "aab"], stops=["aab"])
def test_the_first_stop_string_is_the_same_however_the_text_is_cut(pieces: list[str], stops: list[str]) -> None:
    finder = StopFinder(stops)
    shown = ""
    for piece in pieces:
        shown += finder.push(piece)
        before, _ = first_stop("".join(pieces), stops)
        assert before.startswith(shown)  # nothing that left has to be taken back
    shown += finder.rest()
    assert (shown, finder.found) == first_stop("".join(pieces), stops)


def test_text_is_held_back_only_while_it_can_become_a_stop_string() -> None:
    finder = StopFinder(["<end>"])
    assert [finder.push(piece) for piece in ["go <", "en", "e", " <e", "nd>!"]] == ["go ", "", "<ene", " ", ""]
    assert finder.found == "<end>" and finder.push("more") == "" and finder.rest() == ""


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60), data=st.data())
def test_deltas_are_the_decoded_tokens_up_to_the_stop_string(text: str, data: st.DataObject) -> None:
    tokenizer = byte_level()
    stops = data.draw(st.lists(st.text(min_size=1, max_size=6), max_size=3))
    if text:
        a, b = sorted(data.draw(st.tuples(st.integers(0, len(text) - 1), st.integers(1, len(text)))))
        stops += [text[a:b]] if a < b else []
    ids = tokenizer.encode(text)
    output = TextOutput(tokenizer, tokenizer.encode("the "), SamplingParams(stop=tuple(stops)))
    found = deltas(output, outputs(ids)) if ids else []
    expected, stop = first_stop(tokenizer.decode(ids), stops)
    assert text_of(found) == expected
    if found:
        assert found[-1].finish is (Finish.STOP if stop else Finish.LENGTH)
        assert found[-1].stopped_by == stop and output.stopped == (stop is not None)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 319), max_size=80), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_any_tokens_and_any_stops(ids: list[int], stops: list[str]) -> None:
    tokenizer = byte_level()
    ids = [token for token in ids if token < tokenizer.vocab_size]
    output = TextOutput(tokenizer, [], SamplingParams(stop=tuple(stops)))
    found = deltas(output, outputs(ids)) if ids else []
    assert text_of(found) == first_stop(tokenizer.decode(ids), stops)[0]


@settings(max_examples=80, deadline=None)
@given(st.text(alphabet="ab é世🙂", min_size=1, max_size=50), st.lists(st.text("ab é世🙂", min_size=1, max_size=3)))
def test_byte_fallback_too(text: str, stops: list[str]) -> None:
    tokenizer = byte_fallback()
    ids = tokenizer.encode("b" + text)
    whole, prompt = tokenizer.decode(ids), tokenizer.decode(ids[:2])
    output = TextOutput(tokenizer, ids[:2], SamplingParams(stop=tuple(stops[:8])))
    found = deltas(output, outputs(ids[2:])) if ids[2:] else []
    assert text_of(found) == first_stop(whole[len(prompt) :], stops[:8])[0]


def test_no_stop_string_within_min_tokens() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("xxxxx")
    assert len(ids) == 5
    output = TextOutput(tokenizer, [], SamplingParams(stop=("x",), min_tokens=3))
    assert [delta.text for delta in deltas(output, outputs(ids))] == ["x", "x", "x", ""]


# ---- how a text ends


def test_the_token_that_ends_a_text_is_no_part_of_it() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("a b")
    params = SamplingParams(stop_token_ids=(ids[-1],))
    found = deltas(TextOutput(tokenizer, [], params), outputs(ids, Finish.STOP))
    assert text_of(found) == tokenizer.decode(ids[:-1])
    assert found[-1].finish is Finish.STOP and found[-1].stopped_by == ids[-1] and found[-1].token_ids == (ids[-1],)
    ended = deltas(TextOutput(tokenizer, [], SamplingParams()), outputs([*ids, tokenizer.eos_id], Finish.STOP))
    assert text_of(ended) == "a b" and ended[-1].stopped_by is None


def test_what_is_held_back_leaves_at_the_end() -> None:
    tokenizer = byte_level()
    params = SamplingParams(stop=("b!",))
    for finish in (Finish.LENGTH, Finish.ABORT):
        output = TextOutput(tokenizer, [], params)
        found = deltas(output, outputs(tokenizer.encode("a b"), finish))
        assert text_of(found) == "a b" and found[-1].finish is finish and not output.stopped
    output = TextOutput(tokenizer, [], params)
    found = [output.push(TokenOutput(request_id="r", token_id=t)) for t in tokenizer.encode("a b")]
    last = output.push(TokenOutput(request_id="r", finish=Finish.ERROR, error="the logits are not finite"))
    assert text_of(found) == "a " and last.text == "b" and last.error == "the logits are not finite"
    assert output.push(TokenOutput(request_id="r", token_id=5)) == TextDelta()


def test_an_unfinished_character_leaves_as_a_replacement_and_can_complete_a_stop_string() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("ok 𝄞")[:-1]
    assert text_of(deltas(TextOutput(tokenizer, [], SamplingParams()), outputs(ids))) == "ok \ufffd"
    found = deltas(TextOutput(tokenizer, [], SamplingParams(stop=("\ufffd",))), outputs(ids))
    assert text_of(found) == "ok " and found[-1].finish is Finish.STOP


# ---- log-probabilities


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_fallback()], ids=["byte level", "byte fallback"])
def test_the_bytes_of_tokens_make_the_text(tokenizer: TextTokenizer) -> None:
    texts = TokenTexts(tokenizer)
    text = "a the 世界 🌍 \x00é"
    ids = tokenizer.encode(text)
    assert b"".join(texts.of(token).bytes for token in ids).decode().removeprefix(" ") == text
    names = [texts.of(token).text for token in range(tokenizer.vocab_size)]
    twice = {name for name in names if names.count(name) > 1}
    assert twice == ({" ", "a", "b"} if tokenizer is byte_fallback() else set())  # <0x61> and "a" are both an a


def test_every_name_of_a_byte_level_token_tells_its_bytes() -> None:
    texts = TokenTexts(byte_level())
    for token in range(byte_level().vocab_size):
        piece = texts.of(token)
        if piece.text.startswith("bytes:"):
            assert bytes.fromhex(piece.text.removeprefix("bytes:").replace("\\x", "")) == piece.bytes
        else:
            assert piece.text.encode() == piece.bytes and byte_level().decode([token]) in (piece.text, "")
    assert texts.of(10**6).text == "token_id:1000000"


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_offsets_point_into_the_text(text: str) -> None:
    tokenizer = byte_level()
    ids = [*tokenizer.encode(text), tokenizer.eos_id]
    params = SamplingParams(logprobs=0)
    output = TextOutput(tokenizer, [], params, offset=7)
    news = [TokenOutput(request_id="r", token_id=t, logprobs=TokenLogprobs(-1.0, 1)) for t in ids]
    entries = [entry for each in news for entry in output.push(each).logprobs]
    assert [entry.token.id for entry in entries] == ids
    for entry, after in zip(entries, entries[1:], strict=False):
        start, end = entry.offset - 7, after.offset - 7
        if not entry.token.text.startswith("bytes:") and start < end:
            assert text[start:end] == entry.token.text
    assert entries[-1].offset == 7 + len(text)


def test_the_formats_of_log_probabilities() -> None:
    tokenizer = byte_level()
    char = tokenizer.encode("𝄞")
    a = tokenizer.encode("a")[0]
    prompt_logprobs = (TokenLogprobs(-2.0, 3, ((a, -0.5),)),)
    output = TextOutput(tokenizer, [a, a], SamplingParams(logprobs=2, prompt_logprobs=1))
    drawn = TokenLogprobs(-1.5, 4, ((a, -0.25), (char[1], -1.0)))
    delta = output.push(TokenOutput(request_id="r", token_id=char[0], logprobs=drawn, prompt_logprobs=prompt_logprobs))
    assert delta.prompt_logprobs is not None
    name, other = (TokenTexts(tokenizer).of(token) for token in char[:2])
    assert name.text.startswith("bytes:\\x")
    assert completion_logprobs([*delta.prompt_logprobs, *delta.logprobs]) == {
        "tokens": ["a", "a", name.text],
        "token_logprobs": [None, -2.0, -1.5],
        "top_logprobs": [None, {"a": -2.0}, {"a": -0.25, other.text: -1.0, name.text: -1.5}],
        "text_offset": [0, 1, 0],
    }
    assert chat_logprobs(delta.logprobs) == {
        "content": [
            {
                "token": name.text, "bytes": list(name.bytes), "logprob": -1.5,
                "top_logprobs": [
                    {"token": "a", "bytes": [97], "logprob": -0.25},
                    {"token": other.text, "bytes": list(other.bytes), "logprob": -1.0},
                ],
            }
        ]
    }  # fmt: skip


def test_a_vocabulary_that_cannot_be_taken_apart_is_decoded(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "is": 1, "##n": 2, "[SEP]": 3}))
    backend.decoder = tokenizers.decoders.WordPiece()
    tokenizer = wrapped(backend, "[SEP]")
    assert "WordPiece" in json.dumps(json.loads(tokenizer.json)) and tokenizer.bytes_by_id == {}
    assert TokenTexts(tokenizer).of(1).text == "is"
