"""`skymoe.LLM` as its users meet it."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from generate import chatty

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

import skymoe
from skymoe.base.errors import ConfigError, FormatError, MachineError
from skymoe.engine.llm import LLM
from skymoe.engine.output import Finish
from skymoe.engine.params import SamplingParams

GREEDY = SamplingParams(max_tokens=8, temperature=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chatty.write(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(model, max_batch=4, max_queue=8, page_size=8) as llm:
        yield llm
        assert llm.stats().num_running == llm.stats().num_waiting == 0
        assert llm.stats().free_pages == llm.stats().num_pages


def test_it_is_the_public_name() -> None:
    assert skymoe.LLM is LLM and skymoe.SamplingParams is SamplingParams


def test_texts_and_tokens_in_their_order(llm: LLM) -> None:
    prompts = ["the fox", [5, 6, 7], "quick", "", "the brown fox"] * 5  # more than fit the queue
    found = llm.generate(prompts, GREEDY)
    assert [completion.prompt for completion in found] == [p if isinstance(p, str) else None for p in prompts]
    assert found[1].prompt_ids == (5, 6, 7) and len(found[3].prompt_ids) == 1
    for completion in found:
        (answer,) = completion.outputs
        assert answer.finish is Finish.LENGTH and len(answer.token_ids) == 8 and answer.logprobs is None
        assert completion.text == answer.text and not answer.error
    assert [c.text for c in found[:5]] == [c.text for c in found[5:10]]
    (alone,) = llm.generate("the fox", GREEDY)
    assert alone.outputs == found[0].outputs
    assert llm.generate([5, 6, 7], GREEDY)[0].outputs == found[1].outputs
    assert llm.generate([], GREEDY) == []


def test_parameters_for_each_prompt_and_several_answers(llm: LLM) -> None:
    each = [SamplingParams(max_tokens=3, temperature=0), SamplingParams(max_tokens=5, seed=4)]
    short, long = llm.generate(["the", "the"], each, n=3)
    assert [len(answer.token_ids) for answer in short.outputs + long.outputs] == [3, 3, 3, 5, 5, 5]
    assert len({answer.token_ids for answer in short.outputs}) == 1
    seeds = [llm.generate("the", SamplingParams(max_tokens=5, seed=4 + i))[0].outputs[0] for i in range(3)]
    assert list(long.outputs) == seeds
    fresh = llm.generate("the", SamplingParams(max_tokens=8), n=4)[0].outputs
    assert len({answer.token_ids for answer in fresh}) > 1
    with pytest.raises(ConfigError, match="2 sets of sampling parameters for 1 prompts"):
        llm.generate(["the"], each)
    with pytest.raises(ConfigError, match="n must be"):
        llm.generate(["the"], n=0)


def test_logprobs_are_those_of_the_tokens(llm: LLM) -> None:
    params = SamplingParams(max_tokens=4, temperature=0, logprobs=3, prompt_logprobs=0)
    (found,) = llm.generate([[5, 6, 7, 8]], params)
    logprobs = found.outputs[0].logprobs
    assert logprobs is not None and found.prompt_logprobs is not None and len(found.prompt_logprobs) == 3
    for token, entry in zip(found.outputs[0].token_ids, logprobs, strict=True):
        assert entry.rank == 1 and entry.top[0] == (token, entry.logprob) and len(entry.top) == 3


def test_the_same_alone_and_in_any_company_to_the_last_bit(llm: LLM) -> None:
    params = SamplingParams(max_tokens=10, temperature=0.9, seed=11, logprobs=2, prompt_logprobs=1)
    prompts = [[5 + i, *range(20, 20 + 3 * i)] for i in range(9)]
    alone = [llm.generate([prompt], params)[0] for prompt in prompts]
    together = llm.generate(prompts, params)
    backwards = llm.generate(prompts[::-1], params)[::-1]
    for one, two, three in zip(alone, together, backwards, strict=True):
        assert one.outputs == two.outputs == three.outputs
        assert one.prompt_logprobs == two.prompt_logprobs == three.prompt_logprobs


def test_a_stop_string_ends_the_answer_and_its_request(llm: LLM) -> None:
    (free,) = llm.generate("the fox", SamplingParams(max_tokens=30, temperature=0))
    word = free.text[6:9]
    (found,) = llm.generate("the fox", SamplingParams(max_tokens=30, temperature=0, stop=(word,)))
    answer = found.outputs[0]
    assert answer.finish is Finish.STOP and answer.stopped_by == word
    assert answer.text == free.text[: free.text.index(word)]
    assert llm.stats().num_running == 0


def test_one_stop_string_is_not_taken_for_its_letters() -> None:
    assert SamplingParams(stop="</s>").stop == ("</s>",)  # type: ignore[arg-type]
    for bad in ("", "x" * 257, ("\ud800",), (5,)):
        with pytest.raises(ConfigError, match="stop takes"):
            SamplingParams(stop=bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("penalty", [0, 1e-300, 0.0099, 10.1])
def test_a_repetition_penalty_that_would_leave_no_numbers_is_refused(penalty: float) -> None:
    with pytest.raises(ConfigError, match="repetition_penalty must be from 0.01 to 10"):
        SamplingParams(repetition_penalty=penalty)
    assert SamplingParams(repetition_penalty=0.01).repetition_penalty == 0.01


def test_what_cannot_be_answered_is_named_before_any_work(llm: LLM) -> None:
    before = llm.stats().num_steps
    for prompts, told in (
        (["the", [1] * 300], "prompt 1: .*300 tokens"),
        ([[5], [320]], "prompt 1: .*320"),
        ([[5], [-1]], "prompt 1: "),
        ([[5], []], "prompt 1: .*empty"),
    ):
        with pytest.raises(ConfigError, match=told):
            llm.generate(prompts, GREEDY)
    with pytest.raises(ConfigError, match="300 tokens"):
        llm.stream([1] * 300)
    assert llm.stats().num_steps == before


def test_a_stream_is_the_answer_in_pieces(llm: LLM) -> None:
    (whole,) = llm.generate("the fox", GREEDY)
    deltas = list(llm.stream("the fox", GREEDY))
    assert "".join(delta.text for delta in deltas) == whole.text
    assert sum((delta.token_ids for delta in deltas), ()) == whole.outputs[0].token_ids
    assert [delta.finish for delta in deltas if delta.finish] == [Finish.LENGTH]


def test_a_stream_that_is_left_gives_its_pages_back(llm: LLM) -> None:
    stream = llm.stream("the", SamplingParams(max_tokens=100, temperature=0))
    list(islice(stream, 3))
    assert llm.stats().num_running == 1
    (other,) = llm.generate("the fox", GREEDY)  # goes on beside it
    assert other == llm.generate("the fox", GREEDY)[0]
    assert sum(len(delta.token_ids) for delta in islice(stream, 20)) == 20  # what came meanwhile is not lost
    stream.close()
    assert llm.stats().num_running == 0 and llm.stats().free_pages == llm.stats().num_pages


def test_a_stream_that_the_garbage_collector_ends_within_a_step(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = llm.stream("the", SamplingParams(max_tokens=100, temperature=0))
    next(stream)
    circle: list[object] = [stream]
    circle.append(circle)
    step = llm._engine.step
    gc.disable()
    del stream, circle
    monkeypatch.setattr(llm._engine, "step", lambda: (gc.collect(), step())[1])
    try:
        (found,) = llm.generate("the fox", GREEDY)
    finally:
        gc.enable()
    assert len(found.outputs[0].token_ids) == GREEDY.max_tokens
    assert llm.stats().num_running == 0 and llm.stats().free_pages == llm.stats().num_pages


def test_several_threads_share_a_model(llm: LLM) -> None:
    expected = {word: llm.generate(word, GREEDY)[0].text for word in ("the", "quick", "brown", "fox")}
    found: dict[str, str] = {}

    def ask(word: str) -> None:
        found[word] = "".join(delta.text for delta in llm.stream(word, GREEDY))

    threads = [threading.Thread(target=ask, args=(word,)) for word in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == expected


def test_conversations(llm: LLM) -> None:
    talk = [{"role": "user", "content": "the fox"}]
    (one,) = llm.chat(talk, GREEDY)
    assert llm.tokenizer is not None
    assert one.prompt_ids == tuple(llm.tokenizer.encode("[user] the fox\n[assistant]"))
    two = llm.chat([talk, [{"role": "user", "content": "quick"}]], GREEDY)
    assert two[0].outputs == one.outputs and len(two) == 2
    assert llm.chat([], GREEDY) == []
    with pytest.raises(ConfigError):
        llm.chat([{"role": "god", "content": "x"}], GREEDY)


def test_without_a_tokenizer_prompts_are_tokens(model: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        os.link(model / name, tmp_path / name)
    with LLM(tmp_path) as llm, LLM(model) as other:
        assert llm.tokenizer is None
        assert llm.generate([5, 6], GREEDY)[0].outputs[0].token_ids == (
            other.generate([5, 6], GREEDY)[0].outputs[0].token_ids
        )
        with pytest.raises(ConfigError, match="tokenizer.json"):
            llm.generate("the", GREEDY)
        with pytest.raises(FormatError, match="chat template"):
            llm.chat([{"role": "user", "content": "x"}])


def test_end_tokens_of_generation_config_end_an_answer(model: Path, tmp_path: Path) -> None:
    """As with transformers and vLLM: many chat models name the end of a turn there, and only the end of text before."""
    shutil.copytree(model, tmp_path / "m")
    with LLM(model) as llm:
        (whole,) = llm.generate([[5, 6, 7]], replace(GREEDY, ignore_eos=True))
    ids = whole.outputs[0].token_ids
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids[3], 10**6]}))
    with LLM(tmp_path / "m") as llm:
        (found,) = llm.generate([[5, 6, 7]], GREEDY)
        assert ids[3] in llm.info.eos_ids and 10**6 not in llm.info.eos_ids
    assert found.outputs[0].finish is Finish.STOP
    assert found.outputs[0].token_ids == ids[: ids.index(ids[3]) + 1]


def test_options_are_read_strictly(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_batch"):
        LLM(model, max_bach=3)
    with pytest.raises(ConfigError, match="tp"):
        LLM(model, tp=0)
    with pytest.raises(FormatError, match="no such model"):
        LLM(tmp_path / "nowhere")


SCRIPT = """
import sys, skymoe
from pathlib import Path
llm = skymoe.LLM(sys.argv[1], tp=2)
pids = llm._engine._group.pids
print(*pids, flush=True)
{}
"""


def follower_of(script: str, model: Path, *, interrupt: bool) -> tuple[int, int, str]:
    """Run `script` after a model on two ranks is up; the follower's pid, the exit code, standard error."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(script), str(model)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    if interrupt:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=120)
    return pid, process.returncode, told


ENDLESS = """
params = skymoe.SamplingParams(max_tokens=100, temperature=0, ignore_eos=True)
for delta in llm.stream([5], params):
    print("token", flush=True)
    while True:
        llm.generate([[6]] * 8, params)
"""


@pytest.mark.parametrize(
    ("script", "interrupt"),
    [
        pytest.param("llm.close(); llm.close()", False, marks=pytest.mark.slow),
        pytest.param("sys.exit(5)", False, marks=pytest.mark.slow),
        (ENDLESS, True),
    ],
)
def test_no_process_is_left(model: Path, script: str, interrupt: bool) -> None:
    pid, code, told = follower_of(script, model, interrupt=interrupt)
    assert code == (-signal.SIGINT if interrupt else 5 if "exit" in script else 0), told
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


def test_a_rank_that_dies_is_named_and_the_rest_can_be_closed(model: Path) -> None:
    with LLM(model, tp=2) as llm:
        os.kill(llm._engine._group.pids[0], signal.SIGKILL)
        with pytest.raises(MachineError, match=r"rank 1 .*SIGKILL"):
            llm.generate([[5]] * 20, SamplingParams(max_tokens=100, ignore_eos=True))
        with pytest.raises(MachineError):
            llm.generate([[5]], GREEDY)
