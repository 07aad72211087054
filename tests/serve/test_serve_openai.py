"""The server as OpenAI's clients, vLLM's users and evaluation harnesses see it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serve.servers import Running, make_model, server

openai = pytest.importorskip("openai")

SENTENCE = "the quick brown fox jumps over the lazy dog"
PLAIN: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with server(make_model(tmp_path_factory.mktemp("serve") / "fox"), name="fox") as running:
        yield running


@pytest.fixture
def http(running: Running) -> Iterator[httpx.Client]:
    with running.client() as client:
        yield client


def post(http: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def refused(http: httpx.Client, path: str, status: int, **body: Any) -> dict[str, Any]:
    answer = http.post(path, json=body)
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    return dict(answer.json()["error"])


def events(http: httpx.Client, path: str, **body: Any) -> list[dict[str, Any]]:
    answer = http.post(path, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    return [json.loads(event.removeprefix("data: ")) for event in answer.text.split("\n\n")[:-2]]


def test_openai_sdk_conformance(running: Running) -> None:
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key=running.key, max_retries=0)
    assert [model.id for model in client.models.list()] == ["fox"]
    assert client.models.retrieve("fox").id == "fox"
    done = client.completions.create(model="fox", prompt=SENTENCE, max_tokens=9, temperature=0)
    assert done.choices[0].finish_reason == "length" and done.usage is not None
    assert done.usage.completion_tokens == 9 and done.usage.total_tokens == done.usage.prompt_tokens + 9
    chat = client.chat.completions.create(
        model="fox", messages=[{"role": "user", "content": "the fox"}], max_completion_tokens=5, logprobs=True,
        top_logprobs=3, n=2, user="somebody", store=False,
    )  # fmt: skip
    assert [choice.index for choice in chat.choices] == [0, 1]
    content = chat.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content is not None and len(content) == 5 and all(len(entry.top_logprobs) == 3 for entry in content)
    assert b"".join(bytes(entry.bytes or []) for entry in content).decode() == chat.choices[0].message.content
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="wolf", prompt="x")
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(
            model="fox", messages=[{"role": "user", "content": "x"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )  # fmt: skip
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="wrong", max_retries=0).models.list()


def test_openai_sdk_streams(running: Running) -> None:
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key=running.key, max_retries=0)
    options: dict[str, Any] = dict(model="fox", messages=[{"role": "user", "content": SENTENCE}], max_tokens=12, seed=1)
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage and all(chunk.usage is None for chunk in chunks[:-1])
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == "length"
    assert len({chunk.id for chunk in chunks}) == 1
    texts = {0: "", 1: "", 2: "", 3: ""}
    for chunk in client.completions.create(model="fox", prompt=["the fox", "a dog"], n=2, max_tokens=6, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    fox, dog = (client.completions.create(model="fox", prompt=p, max_tokens=6) for p in ("the fox", "a dog"))
    assert list(texts.values()) == [fox.choices[0].text] * 2 + [dog.choices[0].text] * 2


def test_openai_sdk_async(running: Running) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key=running.key, max_retries=0) as client:
            answers = await asyncio.gather(
                *(client.completions.create(model="fox", prompt=f"{SENTENCE} {i}", max_tokens=8) for i in range(16))
            )
            stream = await client.completions.create(model="fox", prompt=f"{SENTENCE} 3", max_tokens=8, stream=True)
            return [answer.choices[0].text for answer in answers] + [
                "".join([chunk.choices[0].text async for chunk in stream])
            ]

    texts = asyncio.run(ask())
    assert texts[3] == texts[-1] and len(texts) == 17


def test_events_are_as_openai_sends_them(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": "the fox", "max_tokens": 3, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert all(event.startswith("data: ") for event in events[:-1]) and events[-1] == ""
    assert events[-2] == "data: [DONE]"
    first = json.loads(events[0].removeprefix("data: "))
    assert first["object"] == "text_completion" and first["choices"][0]["finish_reason"] is None
    assert "usage" not in first


def test_prompts_as_text_lists_and_tokens(http: httpx.Client) -> None:
    ids = [post(http, "/tokenize", prompt=text)["tokens"] for text in ("the fox", "a lazy dog")]
    texts = post(http, "/v1/completions", prompt=["the fox", "a lazy dog"], max_tokens=4)["choices"]
    tokens = post(http, "/v1/completions", prompt=ids, max_tokens=4)["choices"]
    single = [post(http, "/v1/completions", prompt=each, max_tokens=4)["choices"][0] for each in (ids[0], "the fox")]
    assert texts == tokens
    assert single[0] == single[1] == texts[0]
    assert post(http, "/detokenize", tokens=ids[1]) == {"prompt": "a lazy dog"}


def test_lm_evaluation_harness_scores_as_it_does_against_vllm(http: httpx.Client) -> None:
    """`local-completions` sends context + continuation as tokens, one token more, and reads `[ctxlen:-1]`."""
    context, whole = (post(http, "/tokenize", prompt=text)["tokens"] for text in ("the quick brown", SENTENCE))
    body = {
        "model": "fox",
        "prompt": [whole],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    choice = post(http, "/v1/completions", **body)["choices"][0]
    found = choice["logprobs"]
    assert len(found["tokens"]) == len(whole) + 1 == len(found["token_logprobs"]) == len(found["top_logprobs"])
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    scored = found["token_logprobs"][len(context) : -1]
    assert len(scored) == len(whole) - len(context) and all(value == -0.5 for value in scored)
    for token, top in zip(found["tokens"][1:-1], found["top_logprobs"][1:-1], strict=True):
        assert max(top, key=top.get) == token
    assert choice["text"].startswith(SENTENCE) and found["text_offset"][0] == 0
    assert [choice["text"][at:] for at in found["text_offset"]][1].startswith(found["tokens"][1])
    none = post(http, "/v1/completions", **{**body, "max_tokens": 0})
    assert none["choices"][0]["text"] == SENTENCE and none["usage"]["completion_tokens"] == 0
    assert len(none["choices"][0]["logprobs"]["tokens"]) == len(whole)
    streamed = http.post("/v1/completions", json={**body, "max_tokens": 0, "stream": True}).text
    event = json.loads(streamed.split("\n\n")[0].removeprefix("data: "))
    assert event["choices"][0]["logprobs"] == none["choices"][0]["logprobs"]


def test_stop_strings_end_the_text_and_the_request(http: httpx.Client, running: Running) -> None:
    plain = post(http, "/v1/completions", prompt=SENTENCE, max_tokens=64)["choices"][0]["text"]
    choice = post(http, "/v1/completions", prompt=SENTENCE, max_tokens=1000, stop=["lazy d", "zzz"])["choices"][0]
    assert choice == {
        "index": 0, "text": plain[: plain.index("lazy d")], "logprobs": None, "finish_reason": "stop",
    }  # fmt: skip
    streamed = http.post(
        "/v1/completions", json={"prompt": SENTENCE, "max_tokens": 1000, "stop": "lazy d", "stream": True}
    )
    pieces = [json.loads(e.removeprefix("data: ")) for e in streamed.text.split("\n\n")[:-2]]
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == choice["text"]
    assert running.stats()["num_running"] == 0
    end = post(http, "/tokenize", prompt="dog")["tokens"][:1]
    by_token = post(http, "/v1/completions", prompt="dog", max_tokens=9, stop_token_ids=end)
    assert by_token["choices"][0]["finish_reason"] == "stop"


def test_the_context_ends_the_answer(http: httpx.Client) -> None:
    usage = post(http, "/v1/completions", prompt="the fox " * 10, max_tokens=10**6, ignore_eos=True)["usage"]
    assert usage["total_tokens"] == 2048
    chat = post(http, "/v1/chat/completions", messages=[{"role": "user", "content": "hello"}])
    assert chat["choices"][0]["finish_reason"] == "length" and chat["usage"]["total_tokens"] == 2048


def test_prompt_longer_than_context_400(http: httpx.Client) -> None:
    for body in ({"prompt": "the fox " * 2000}, {"prompt": [1] * 2048}, {"prompt": ["a", [1] * 3000][1]}):
        assert refused(http, "/v1/completions", 400, **body)["code"] == "context_length_exceeded"
    long = [{"role": "user", "content": "the fox " * 2000}]
    assert refused(http, "/v1/chat/completions", 400, messages=long)["code"] == "context_length_exceeded"
    assert post(http, "/v1/completions", prompt=[1] * 2047, max_tokens=5)["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 9), ("n", 0), ("n", "2"), ("n", True), ("n", 1.5), ("max_tokens", -1), ("temperature", -0.1),
        ("temperature", 1e999),
        ("top_p", 0), ("top_p", 1.01), ("top_k", -2), ("min_p", 2), ("presence_penalty", 3), ("seed", 2**70),
        ("repetition_penalty", 1e-300), ("repetition_penalty", 0), ("repetition_penalty", 0.009),
        ("stop", ["a"] * 9), ("stop", [""]), ("stop", "x" * 300), ("logit_bias", {"x": 1}), ("logit_bias", {"01": 1}),
        ("logit_bias", {"1": 101}), ("logit_bias", {str(i): 1 for i in range(301)}), ("logit_bias", {"300": 1}),
        ("logprobs", 21), ("logprobs", True), ("best_of", 2), ("suffix", "x"), ("prompt", []), ("prompt", ""),
        ("prompt", [[]]), ("prompt", [300]), ("prompt", [-1]), ("prompt", ["a", 1]), ("prompt", [[1], "a"]),
        ("prompt", None), ("prompt", ["a"] * 200), ("stop_token_ids", [300]), ("stream", "yes"), ("model", 5),
    ],
)  # fmt: skip
def test_every_number_is_bounded(http: httpx.Client, field: str, value: Any) -> None:
    content = json.dumps({"prompt": "the fox", "max_tokens": 1, field: value}).replace("Infinity", "1e999")
    answer = http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] is None or error["param"].split(".")[0] == field or error["code"] == "invalid_token"


@pytest.mark.parametrize(
    "extra",
    [
        {"tools": [{"type": "function"}]}, {"functions": [{}]}, {"tool_choice": "required"}, {"n": 100},
        {"response_format": {"type": "json_object"}}, {"response_format": {"type": "json_schema", "json_schema": {}}},
        {"modalities": ["audio"]}, {"audio": {"voice": "x"}}, {"messages": []}, {"messages": [{"role": "user"}]},
        {"messages": [{"role": "tool", "content": "x"}]}, {"messages": [{"role": "user", "content": []}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1"}}]}]},
        {"max_completion_tokens": 0}, {"top_logprobs": 21}, {"function_call": {"name": "f"}}, {"documents": [{}]},
        {"web_search_options": {}}, {"chat_template": "{{ 1 }}"}, {"chat_template_kwargs": {"enable_thinking": True}},
        {"continue_final_message": True}, {"add_special_tokens": True}, {"echo": True},
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(http: httpx.Client, extra: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, **extra}
    error = refused(http, "/v1/chat/completions", 400, **body)
    assert error["param"].split(".")[0] == next(iter(extra))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("structured_outputs", {"json": {}}), ("guided_json", {"type": "object"}), ("guided_choice", ["a", "b"]),
        ("guided_regex", "a+"), ("guided_grammar", "root ::= a"), ("truncate_prompt_tokens", 5), ("bad_words", ["a"]),
        ("allowed_token_ids", [1, 2]), ("include_stop_str_in_output", True), ("skip_special_tokens", False),
        ("prompt_logprobs", 1), ("use_beam_search", True), ("length_penalty", 0.5),
        ("use_beam_search", 0), ("skip_special_tokens", 1), ("include_stop_str_in_output", 0.0),
        ("logits_processors", ["x"]), ("return_tokens_as_token_ids", True), ("best_of", 2),
        ("response_format", {"type": "json_object"}),
    ],
)  # fmt: skip
def test_what_would_change_the_answer_is_refused_by_name(http: httpx.Client, field: str, value: Any) -> None:
    for path, body in PLAIN.items():
        error = refused(http, path, 400, **body, **{field: value})
        assert error["param"].split(".")[0] == field and error["message"].startswith(field)


def test_an_unsupported_field_is_told_as_such(http: httpx.Client) -> None:
    for extra, told in (
        ({"guided_json": {}}, "guided_json: is not supported; leave it out"),
        ({"bad_words": ["x"]}, "bad_words: is not supported; leave it out, or empty"),
        ({"skip_special_tokens": False}, "skip_special_tokens: is not supported but as true"),
        ({"prompt_embeds": "AAAA"}, "prompt_embeds: is not supported; leave it out"),
    ):
        assert refused(http, "/v1/completions", 400, prompt="x", **extra)["message"] == told


@pytest.mark.parametrize("prompt", [[True], [1.5], [1, "a"], ["a", 1], [[]], [], None, "", 5, {}, ["a"] * 200, [[-1]]])
def test_a_wrong_prompt_is_told_what_a_prompt_is(http: httpx.Client, prompt: Any) -> None:
    error = refused(http, "/v1/completions", 400, prompt=prompt)
    assert error["param"] == "prompt"
    assert error["message"] == (
        "prompt: must be a text, a list of tokens (whole numbers from 0), or a list of up to 128 texts"
        " or of up to 128 lists of tokens; none of them empty"
    )


@pytest.mark.parametrize("stop", [[1], ["a"] * 9, "", [""], "x" * 65, 5])
def test_a_wrong_stop_is_told_what_a_stop_is(http: httpx.Client, stop: Any) -> None:
    error = refused(http, "/v1/completions", 400, prompt="x", stop=stop)
    assert error["message"] == "stop: must be a text of 1 to 64 characters, or a list of up to 8 such texts"


def test_token_ids_come_when_asked_for(http: httpx.Client) -> None:
    ids = post(http, "/tokenize", prompt="the fox €")["tokens"]
    asked: dict[str, Any] = {"prompt": [ids, ids[:2]], "max_tokens": 12, "n": 2}
    plain = post(http, "/v1/completions", **asked)
    assert all(set(choice) == {"index", "text", "logprobs", "finish_reason"} for choice in plain["choices"])
    whole = post(http, "/v1/completions", **asked, return_token_ids=True)
    streamed = events(http, "/v1/completions", **asked, return_token_ids=True)
    for choice, without in zip(whole["choices"], plain["choices"], strict=True):
        prompt = asked["prompt"][choice["index"] // 2]
        assert choice["prompt_token_ids"] == prompt and choice["text"] == without["text"]
        assert post(http, "/detokenize", tokens=choice["token_ids"])["prompt"] == choice["text"]
        own = [event["choices"][0] for event in streamed if event["choices"][0]["index"] == choice["index"]]
        assert [piece["prompt_token_ids"] for piece in own] == [prompt] + [None] * (len(own) - 1)
        assert sum((piece["token_ids"] for piece in own), []) == choice["token_ids"]
    assert sum(len(choice["token_ids"]) for choice in whole["choices"]) == whole["usage"]["completion_tokens"] == 48
    (scored,) = post(http, "/v1/completions", prompt=ids, max_tokens=0, echo=True, return_token_ids=True)["choices"]
    assert scored["token_ids"] == [] and scored["prompt_token_ids"] == ids
    by_token = {"prompt": ids, "stop_token_ids": ids[:1], "max_tokens": 99, "return_token_ids": True}
    (ended,) = post(http, "/v1/completions", **by_token)["choices"]
    assert ended["finish_reason"] == "stop" and ended["token_ids"][-1] == ids[0]


def test_token_ids_of_a_conversation(http: httpx.Client) -> None:
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "the € fox"}], "max_tokens": 20, "n": 2}
    ids = post(http, "/tokenize", messages=asked["messages"])["tokens"]
    plain = post(http, "/v1/chat/completions", **asked)
    assert "prompt_token_ids" not in plain and "token_ids" not in plain["choices"][0]
    whole = post(http, "/v1/chat/completions", **asked, return_token_ids=True)
    streamed = events(http, "/v1/chat/completions", **asked, return_token_ids=True)
    assert whole["prompt_token_ids"] == ids == streamed[0]["prompt_token_ids"]
    assert not any("prompt_token_ids" in event for event in streamed[1:])
    for choice in whole["choices"]:
        assert post(http, "/detokenize", tokens=choice["token_ids"])["prompt"] == choice["message"]["content"]
        own = [event["choices"][0] for event in streamed if event["choices"][0]["index"] == choice["index"]]
        assert sum((piece["token_ids"] or [] for piece in own), []) == choice["token_ids"]
    assert not any("token_ids" in event["choices"][0] for event in events(http, "/v1/chat/completions", **asked))


def test_a_conversation_may_end_before_the_answer_opens(http: httpx.Client) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "the fox"}], "add_generation_prompt": False}
    ids = post(http, "/tokenize", **body)["tokens"]
    answer = post(http, "/v1/chat/completions", **body, max_tokens=1, return_token_ids=True)
    assert answer["prompt_token_ids"] == ids
    opened = post(http, "/v1/chat/completions", **{**body, "add_generation_prompt": None, "max_tokens": 1})
    assert opened["usage"]["prompt_tokens"] > len(ids) == answer["usage"]["prompt_tokens"]


def test_what_asks_for_nothing_is_accepted(http: httpx.Client) -> None:
    neutral = {
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"], "user": "me",
        "metadata": {"a": 1}, "parallel_tool_calls": True, "service_tier": "auto", "seed": None, "stop": None,
        "logit_bias": None, "stream_options": {"include_usage": True}, "top_logprobs": 2, "best_thing": [1],
    }  # fmt: skip
    of_vllm = {
        "structured_outputs": None, "guided_json": None, "guided_choice": None, "guided_regex": None, "bad_words": [],
        "guided_grammar": None, "truncate_prompt_tokens": None, "prompt_logprobs": None, "allowed_token_ids": None,
        "include_stop_str_in_output": False, "skip_special_tokens": True, "use_beam_search": False, "length_penalty": 1,
        "logits_processors": [], "return_tokens_as_token_ids": False, "return_token_ids": False, "best_of": 1.0,
    }  # fmt: skip
    of_chats = {
        "function_call": "auto", "documents": [], "web_search_options": None, "chat_template": None, "audio": None,
        "chat_template_kwargs": {}, "continue_final_message": False, "add_special_tokens": False, "echo": False,
        "add_generation_prompt": True, "functions": [],
    }  # fmt: skip
    for path, body in PLAIN.items():
        assert post(http, path, **body, **of_vllm, **(of_chats if "messages" in body else {"prompt_embeds": None}))
    parts = [{"type": "text", "text": "the"}, {"type": "text", "text": "fox"}]
    messages = [{"role": "developer", "content": "x", "name": "op"}, {"role": "user", "content": parts}]
    answer = post(http, "/v1/chat/completions", messages=messages, max_tokens=1, **neutral)
    assert answer["choices"][0]["logprobs"] is None
    assert post(http, "/v1/completions", prompt="x", max_tokens=2.0, best_of=1, suffix="", min_tokens=9)
    no_text = post(http, "/tokenize", prompt="")
    assert no_text["tokens"] == []


def test_metrics_count_what_happened(http: httpx.Client, running: Running) -> None:
    def value(name: str) -> float:
        lines = [line for line in http.get("/metrics").text.splitlines() if line.startswith(name)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    names = (
        "skymoe_generation_tokens_total{", "skymoe_prompt_tokens_total{", "skymoe_request_success_total{",
        "skymoe_time_to_first_token_seconds_count{", "skymoe_inter_token_latency_seconds_count{",
        "skymoe_e2e_request_latency_seconds_count{", 'skymoe_expert_tokens_total{expert="0"',
        'skymoe_http_requests_total{route="/v1/completions",status="200"}',
    )  # fmt: skip
    before = [value(name) for name in names]
    post(http, "/v1/completions", prompt=[[5, 6, 7], [8]], n=2, max_tokens=5)
    grown = [value(name) - old for name, old in zip(names, before, strict=True)]
    assert grown[:1] == [20] and grown[1] == 8 and grown[2:] == [4, 4, 16, 4, grown[6], 1]
    assert http.get("/metrics").headers["content-type"].startswith("text/plain")
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_hits_total"):
        assert f"skymoe_{name}" in http.get("/metrics").text
    others = value('skymoe_http_requests_total{route="other",status="404"}')
    http.get("/nobody/was/here")
    assert value('skymoe_http_requests_total{route="other",status="404"}') == others + 1
    assert "nobody" not in http.get("/metrics").text


def test_the_page_gets_its_facts(http: httpx.Client) -> None:
    facts = http.get("/stats").json()
    assert facts["model"] == "fox" and facts["moe_layers"] == [0] and len(facts["expert_tokens"][0]) == 4
    assert facts["num_experts"] == 4 and facts["max_model_len"] == 2048 and facts["tokens_per_second"] >= 0
    assert set(facts) >= {"kv_cache_usage", "num_running", "num_waiting", "split", "weights", "kv_dtype"}


def test_a_template_that_refuses_is_told_without_the_servers_paths(http: httpx.Client) -> None:
    messages = [{"role": "user", "content": "refuse me"}]
    error = refused(http, "/v1/chat/completions", 400, messages=messages)
    assert error["code"] == "template_refused" and "as you wish" in error["message"]
    assert error["message"].startswith("the chat template cannot render this conversation\n  why: ")
    assert "/" not in error["message"] and "tokenizer_config" not in error["message"]


def test_a_conversation_is_written_by_the_template(http: httpx.Client) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the <|endoftext|> fox"}]
    ids = post(http, "/tokenize", messages=messages)["tokens"]
    text = "system: be brief\nuser: the <|endoftext|> fox\nassistant: "
    assert post(http, "/detokenize", tokens=ids)["prompt"] == text and 0 not in ids
    names = post(http, "/tokenize", messages=messages, return_token_strs=True, add_generation_prompt=False)
    assert "".join(names["token_strs"]) == text.removesuffix("assistant: ")
    assert post(http, "/v1/chat/completions", messages=messages, max_tokens=1)["usage"]["prompt_tokens"] == len(ids)
