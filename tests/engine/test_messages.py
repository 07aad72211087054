"""Frames: what goes in comes out, whatever the pieces; everything else is refused."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skymoe.base.errors import FormatError
from skymoe.engine.config import EngineConfig
from skymoe.engine.messages import (
    MAX_FRAME,
    Abort,
    Add,
    AskStats,
    Command,
    Failed,
    Inbox,
    Loading,
    News,
    Outputs,
    Ready,
    Start,
    Stats,
    Stop,
    pack,
    read_command,
    read_news,
)
from skymoe.engine.output import EngineInfo, EngineStats, Finish, TokenLogprobs, TokenOutput
from skymoe.engine.params import SamplingParams

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
ids = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
tokens = st.integers(0, 2**31 - 1)
counts = st.integers(0, 2**53)
floats = st.floats(allow_nan=False, allow_infinity=False)


def several(items: st.SearchStrategy, most: int = 4) -> st.SearchStrategy:
    return st.lists(items, max_size=most).map(tuple)


params = st.builds(
    SamplingParams,
    max_tokens=st.none() | st.integers(1, 2**31 - 1),
    temperature=st.floats(0, 100),
    top_k=st.integers(0, 2**31 - 1),
    top_p=st.floats(0, 1, exclude_min=True),
    seed=st.none() | st.integers(0, 2**63 - 1),
    logit_bias=st.dictionaries(tokens, st.floats(-100, 100), max_size=3),
    logprobs=st.none() | st.integers(0, 20),
    stop=several(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9)),
    stop_token_ids=several(tokens),
    ignore_eos=st.booleans(),
)
configs = st.builds(
    EngineConfig,
    model=st.just(Path("a model")),
    split=several(texts),
    kv_memory_gb=st.none() | st.floats(0.1, 100),
    plan=st.none() | st.just(Path("plan.json")),
)
logprobs = st.builds(TokenLogprobs, floats, counts, several(st.tuples(tokens, floats)))
outputs = st.builds(
    TokenOutput,
    request_id=ids,
    token_id=st.none() | tokens,
    logprobs=st.none() | logprobs,
    prompt_logprobs=st.none() | several(logprobs),
    num_cached_tokens=st.none() | counts,
    finish=st.none() | st.sampled_from(Finish),
    error=texts,
)
infos = st.builds(
    EngineInfo,
    name=texts, vocab_size=counts, max_model_len=counts, eos_ids=several(tokens), bos_id=st.none() | tokens,
    num_ranks=counts, num_pages=counts, page_size=counts, num_layers=counts, num_experts=counts,
    moe_layers=several(counts), weights=texts, kv_dtype=texts,
    split=st.dictionaries(texts, several(counts), max_size=2),
)  # fmt: skip
stats = st.builds(EngineStats, num_running=counts, step_seconds=floats, expert_tokens=several(several(counts)))

commands: st.SearchStrategy[Command] = st.one_of(
    st.builds(Start, configs),
    st.builds(Add, ids, several(tokens, 20), params),
    st.builds(Abort, ids),
    st.just(AskStats()),
    st.just(Stop()),
)
news: st.SearchStrategy[News] = st.one_of(
    st.builds(Loading, counts, counts),
    st.builds(Ready, infos),
    st.builds(Outputs, several(outputs)),
    st.builds(Stats, stats),
    st.builds(Failed, texts, texts, texts, texts, st.integers(1, 255)),
)


@given(st.lists(commands, max_size=4), st.lists(news, max_size=4), st.integers(1, 60))
def test_messages_come_back_whatever_the_pieces(said: list[Command], heard: list[News], size: int) -> None:
    for messages, read in ((said, read_command), (heard, read_news)):
        stream = b"".join(map(pack, messages))
        inbox = Inbox(read)
        found = [m for at in range(0, len(stream), size) for m in inbox.feed(stream[at : at + size])]
        assert found == messages
        assert inbox.is_empty


def test_the_default_parameters_can_be_sent() -> None:
    (found,) = Inbox(read_command).feed(pack(Add("a", (1,), SamplingParams())))
    assert found == Add("a", (1,), SamplingParams(logit_bias={}))


GOOD = json.loads(pack(Add("a", (1, 2), SamplingParams(logit_bias={3: 1.0})))[4:])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"type": "news"}, "news"),
        ({"id": ""}, "add.id"),
        ({"id": "x" * 201}, "add.id"),
        ({"id": 5}, "add.id"),
        ({"more": 1}, "add.more"),
        ({"prompt": [1.0]}, "add.prompt.0"),
        ({"prompt": [True]}, "add.prompt.0"),
        ({"prompt": [-1]}, "add.prompt.0"),
        ({"prompt": ["1"]}, "add.prompt.0"),
        ({"prompt": "12"}, "add.prompt"),
        ({"params": {"max_token": 3}}, "max_token"),
        ({"params": {"max_tokens": "3"}}, "max_tokens"),
        ({"params": {"top_p": 7}}, "top_p must be"),
        ({"params": {"seed": 2**63}}, "seed must be"),
        ({"params": None}, "add.params"),
    ],
)
def test_what_is_not_a_command_is_refused(change: dict[str, object], told: str) -> None:
    assert read_command(json.dumps(GOOD).encode()) == Add("a", (1, 2), SamplingParams(logit_bias={3: 1.0}))
    with pytest.raises(FormatError, match=told):
        read_command(json.dumps(GOOD | change).encode())


@pytest.mark.parametrize("payload", [b"", b"{", b"[]", b"\xff", b"null", b'{"type":"loading","done":NaN,"total":1}'])
def test_what_is_no_object_is_refused(payload: bytes) -> None:
    for read in (read_command, read_news):
        with pytest.raises(FormatError):
            read(payload)


def test_a_frame_that_is_too_long_is_refused_before_it_is_read() -> None:
    inbox = Inbox(read_command)
    with pytest.raises(FormatError, match=str(MAX_FRAME + 1)):
        list(inbox.feed(struct.pack(">I", MAX_FRAME + 1)))
    with pytest.raises(FormatError, match="at most"):
        pack(Failed("x" * MAX_FRAME))
    with pytest.raises(FormatError, match="cannot be written"):
        pack(Failed("\ud800"))


def test_a_half_frame_waits() -> None:
    inbox = Inbox(read_command)
    frame = pack(Abort("a"))
    assert list(inbox.feed(frame[:-1])) == []
    assert not inbox.is_empty
    assert list(inbox.feed(frame[-1:])) == [Abort("a")]


def test_the_server_needs_no_torch_to_read() -> None:
    code = "import sys, skymoe.engine.messages; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
