"""`skymoe generate --input`: what is read, what is written, and what a stop leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from generate import chatty

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from skymoe.base.errors import ConfigError, FormatError, MachineError
from skymoe.engine.config import EngineConfig
from skymoe.engine.llm import LLM
from skymoe.engine.params import SamplingParams
from skymoe.generate.batch import fingerprint, run
from skymoe.generate.config import BatchConfig
from skymoe.generate.results import open_results
from skymoe.generate.tasks import check_tasks, read_tasks

LINES: list[dict[str, Any]] = [
    {"prompt": "the fox"},
    {"prompt": [5, 6, 7], "temperature": 0, "logprobs": 2, "max_tokens": 4},
    {"id": "q", "messages": [{"role": "user", "content": "the quick fox"}], "max_tokens": 3},
    {"prompt": "", "stop": ["fox"], "seed": 7},
    {"prompt": [9] * 250},  # longer than the context
    {"prompt": [400]},  # not in the vocabulary
    {"prompt": "brown", "logit_bias": {"5": 100.0}, "temperature": 0, "max_tokens": 2},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chatty.write(tmp_path_factory.mktemp("batch"))


def engine(model: Path, **changes: Any) -> EngineConfig:
    return EngineConfig(model=model, max_batch=2, page_size=8, max_step_tokens=32, **changes)


def config(model: Path, folder: Path, lines: list[Any] | str = LINES, **changes: Any) -> BatchConfig:
    text = lines if isinstance(lines, str) else "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "in.jsonl").write_text(text)
    options: dict[str, Any] = {"engine": engine(model), "max_tokens": 8, "ignore_eos": True, **changes}
    return BatchConfig(input=folder / "in.jsonl", output=folder / "out.jsonl", **options)


def answers(asked: BatchConfig) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in asked.output.read_text("utf-8").splitlines()]
    return sorted(lines, key=lambda line: line["index"])


def test_every_prompt_has_its_answer(model: Path, tmp_path: Path) -> None:
    asked = config(model, tmp_path)
    report = run(asked)
    assert (report.num_prompts, report.num_done, report.num_failed, report.exit_code) == (7, 7, 2, 1)
    found = answers(asked)
    assert [line["index"] for line in found] == list(range(7))
    with LLM(model) as llm:
        alone = [
            *llm.generate("the fox", SamplingParams(max_tokens=8, temperature=0.8, seed=0, ignore_eos=True)),
            *llm.generate([5, 6, 7], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)),
            *llm.chat(
                LINES[2]["messages"], SamplingParams(max_tokens=3, temperature=0.8, seed=2, ignore_eos=True)
            ),
        ]  # fmt: skip
    for line, completion in zip(found, alone, strict=False):
        assert line["text"] == completion.text and line["finish"] == "length"
        assert tuple(line["token_ids"]) == completion.outputs[0].token_ids
        assert line["num_prompt_tokens"] == len(completion.prompt_ids)
    assert found[2]["id"] == "q" and "id" not in found[0]
    assert [len(entry["top"]) for entry in found[1]["logprobs"]] == [2] * 4
    assert "250 tokens" in found[4]["error"] and "400" in found[5]["error"] and "text" not in found[4]
    assert found[6]["token_ids"] == [5, 5]
    assert report.generation_tokens == sum(len(line.get("token_ids", ())) for line in found)


def test_a_later_run_does_only_what_is_left_and_the_same(model: Path, tmp_path: Path) -> None:
    asked = config(model, tmp_path)
    run(asked)
    whole = answers(asked)
    before = asked.output.read_bytes()
    assert run(asked).num_before == 7 and asked.output.read_bytes() == before

    # a stop at any byte: what is whole stays, what is torn is done again, and all is as it would have been
    kept = before.split(b"\n")[:3]
    asked.output.write_bytes(b"\n".join(kept) + b'\n{"index": 1, "te')
    report = run(asked)
    assert (report.num_before, report.num_done) == (3, 7)
    assert asked.output.read_bytes().startswith(b"\n".join(kept) + b"\n") and answers(asked) == whole

    # prompts added at the end leave the rest as it is
    more = config(model, tmp_path, [*LINES, {"prompt": "more"}])
    assert run(more).num_before == 7 and len(answers(more)) == 8 and answers(more)[:7] == whole
    assert run(more.replace(overwrite=True)).num_before == 0 and answers(more)[:7] == whole


@pytest.mark.parametrize("cut", range(0, 12))
def test_a_beginning_of_a_line_is_cut_off(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(b'{"index": 1, "key": "b"}\n' + b'{"index": 0, "k'[:cut])
    with open_results(path, {0: "a", 1: "b"}) as results:
        assert results.done == {1} and results.num_repaired == cut
        results.append([{"index": 0, "key": "a"}])
    assert path.read_text() == '{"index": 1, "key": "b"}\n{"index": 0, "key": "a"}\n'


@pytest.mark.parametrize(
    "content", ["my own notes", "my own notes\n", '{"index": 0}\n', "[1]\n", '{"index": true, "key": "a"}\n']
)
def test_a_file_of_somebody_else_is_left_alone(model: Path, tmp_path: Path, content: str) -> None:
    asked = config(model, tmp_path)
    asked.output.write_text(content)
    with pytest.raises(FormatError, match="out.jsonl:1: .*"):
        run(asked)
    assert asked.output.read_text() == content


def test_answers_to_something_else_are_not_added_to(model: Path, tmp_path: Path) -> None:
    run(config(model, tmp_path, LINES[:2]))
    others: list[tuple[list[Any], dict[str, Any]]] = [
        (LINES[:2], {"temperature": 0.5}),
        (LINES[:2], {"seed": 1}),
        (LINES[:2], {"engine": engine(model, kv_dtype="bf16")}),
        (LINES[1::-1], {}),
        (LINES[:1], {}),
    ]
    for lines, changes in others:
        other = config(model, tmp_path, lines, **changes)
        before = other.output.read_bytes()
        with pytest.raises(ConfigError, match="another run"):
            run(other)
        assert other.output.read_bytes() == before


@pytest.mark.parametrize("name", ["model.safetensors", "chat_template.jinja", "tokenizer.json"])
def test_another_model_of_the_same_size_is_told_from_this_one(model: Path, tmp_path: Path, name: str) -> None:
    before = fingerprint(model)
    shutil.copytree(model, tmp_path / "m")
    assert fingerprint(tmp_path / "m") == before
    data = (tmp_path / "m" / name).read_bytes()
    half = len(data) // 2
    (tmp_path / "m" / name).write_bytes(data[:half] + bytes(byte ^ 1 for byte in data[half:]))
    assert fingerprint(tmp_path / "m") != before


def test_two_runs_do_not_write_one_file(model: Path, tmp_path: Path) -> None:
    asked = config(model, tmp_path)
    with open_results(asked.output, {}), pytest.raises(MachineError, match="another run"):
        run(asked)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("", "no prompt"),
        ("{", "not valid JSON"),
        ("[]", "object, found list"),
        ("{}", 'either "prompt" or "messages"'),
        ('{"prompt": "a", "messages": []}', "messages"),
        ('{"prompt": []}', "no token"),
        ('{"prompt": [1.5]}', "prompt"),
        ('{"prompt": [true]}', "prompt"),
        ('{"prompt": 5}', "prompt"),
        ('{"prompt": "a", "promt": "b"}', "promt"),
        ('{"prompt": "a", "prompt": "b"}', "twice"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens must be"),
        ('{"prompt": "a", "temperature": "1"}', "temperature"),
        ('{"prompt": "a", "temperature": NaN}', "NaN"),
        ('{"prompt": "a", "top_p": 1e400}', "too large"),
        ('{"prompt": "a", "stop": ""}', "stop"),
        ('{"prompt": "a", "stop": 5}', "stop"),
        ('{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias"),
        ('{"prompt": "a", "n": 2}', "unknown key 'n'"),
        ('{"prompt": "\\ud800"}', "JSON"),
        ('{"messages": [{"role": "god", "content": "x"}]}', "role"),
        ('{"messages": [{"role": "user"}]}', "content"),
    ],
)
def test_a_bad_line_is_told_before_any_work(tmp_path: Path, line: str, told: str) -> None:
    good = '{"prompt": "a"}\n' if line else ""
    asked = config(tmp_path / "no model", tmp_path, good + "\n" + line + "\n")
    with pytest.raises(FormatError, match=told) as error:
        run(asked)
    assert "no model" not in str(error.value) and not asked.output.exists()
    assert not line or "in.jsonl:3" in str(error.value)


def test_one_stop_string_may_stand_as_it_is(tmp_path: Path) -> None:
    asked = config(tmp_path, tmp_path, [{"prompt": "a", "stop": "\n"}, {"prompt": "a", "stop": ["\n"]}])
    one, listed = read_tasks(asked)
    assert one.params.stop == listed.params.stop == ("\n",)
    assert check_tasks(asked)[0] == one.digest  # whichever way it is written


def test_many_bad_lines_are_told_together(tmp_path: Path) -> None:
    asked = config(tmp_path / "no model", tmp_path, '{"prompt": "a"}\n' + "{}\n" * 9)
    with pytest.raises(FormatError, match="9 of 10 prompts") as error:
        run(asked)
    assert "in.jsonl:2" in str(error.value) and "and 4 more" in str(error.value)


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(model: Path, tmp_path: Path) -> None:
    asked = config(model, tmp_path, [{"prompt": [i + 1], "max_tokens": 150} for i in range(300)])
    command = [
        sys.executable, "-m", "skymoe", "generate", str(model), "--input", str(asked.input), "--output",
        str(asked.output), "--ignore-eos", "--set", "engine.max_batch=2",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not (asked.output.exists() and asked.output.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 75 and "the same command goes on" in told and "Traceback" not in told
    done = answers(asked)
    assert 0 < len(done) < 300
    assert asked.output.read_bytes().endswith(b"\n")


def test_flags_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    for arguments, told in (
        (["m", "text", "--input", "in.jsonl"], "not both"),
        (["m", "text", "--output", "out.jsonl"], "--output belongs to --input"),
        (["m", "text", "--set", "engine.max_batch=2"], "--set belongs to --input"),
        (["m"], "what is to be continued"),
        (["m", "--input", "in.jsonl"], "output"),
        (["m", "--input", "in.jsonl", "--output", "o.jsonl", "--split", "head=1"], "no such file"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "skymoe", "generate", *arguments], capture_output=True, text=True, cwd=tmp_path,
            check=False,
        )  # fmt: skip
        assert done.returncode == 2 and told in done.stderr, done.stderr
