"""The chat page in a real browser, before a server with the echo engine; and what its file may not contain."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serve.browser import ENTER, ESCAPE, SHIFT, Page, browser, find_browser
from serve.servers import KEY, Running, make_model, server

from skymoe.serve.page import page_policy
from skymoe.serve.static_files import FOLDER, INDEX, read_page
from skymoe.spec.model import MoESpec

PAGE = (FOLDER / INDEX).read_bytes()
with_browser = pytest.mark.skipif(find_browser() is None, reason="needs chromium and chromedriver")
ANSWERED = "!document.getElementById('stop').checkVisibility() && document.querySelector('article.model footer')"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("page") / "fox")


@pytest.fixture(scope="module")
def running(model: Path) -> Iterator[Running]:
    with server(model, engine={"step_s": 0.02}) as running:
        yield running


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.fixture
def page(chromium: Page) -> Page:
    chromium.device(1280, 800)
    return chromium


def enter(page: Page, running: Running, *, max_tokens: int = 12) -> None:
    """Open the page, give the key, and see the server."""
    page.open(running.url)
    page.run("sessionStorage.clear(); localStorage.clear(); location.reload()")
    page.wait("document.getElementById('state')?.textContent === 'API key needed'")
    page.type("#key", running.key + "\t")
    page.wait("document.getElementById('state').textContent.startsWith('ready')")
    set_field(page, "max_tokens", max_tokens)
    page.complaints()  # the 401 before the key


def set_field(page: Page, name: str, value: object) -> None:
    page.run("document.querySelector(`[name=${arguments[0]}]`).value = arguments[1]", name, value)


def test_one_file_that_brings_everything_and_hides_nothing(running: Running) -> None:
    """Sources in the page, not in the test: no host, no handler or style in an attribute, no text made markup."""
    text = PAGE.decode()
    assert read_page().keys() == {INDEX} and len(PAGE) < 64_000 and len(text.splitlines()) <= 600
    assert not re.findall(r"https?:|//[a-z]|\bsrc=|@import|url\(", text)
    assert not re.findall(r"<[a-z][^>]*\s(?:on[a-z]+|style)=", text)
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(|\.cssText", text)
    assert text.count("<script") == text.count("<style") == 1
    answer = httpx.get(running.url, trust_env=False)
    assert answer.content == PAGE and answer.headers["content-security-policy"] == page_policy(PAGE)
    assert answer.headers["x-frame-options"] == "DENY"
    policy = dict(part.split(" ", 1) for part in page_policy(PAGE).split("; "))
    assert policy["default-src"] == "'none'" and re.fullmatch(r"'sha256-[\w+/]{43}='", policy["script-src"])
    assert policy["connect-src"] == "'self'" and "unsafe" not in page_policy(PAGE)


def test_the_policy_names_what_stands_in_the_page() -> None:
    """The digests of an example by sha256sum and base64; a page without scripts runs none."""
    policy = page_policy(b"<style>a{}</style><script>1</script><script>\n2</script>")
    assert "script-src 'sha256-a4ayc/80/OGda4BO/1o/V0etpOqiLx1JwB5S3beHW0s=' 'sha256-" in policy
    assert "script-src 'none'; style-src 'none'" in page_policy(b"<p>")


@with_browser
def test_a_key_a_question_an_answer_in_pieces_and_the_next_question(page: Page, running: Running) -> None:
    enter(page, running, max_tokens=40)
    assert page.text("#name") == "fox" and "running" in page.text("#facts")
    page.type("#text", f"the{SHIFT}{ENTER}{SHIFT}lazy <b>dog</b>")
    assert page.run("return document.getElementById('text').value") == "the\nlazy <b>dog</b>"
    page.type("#text", ENTER)
    part = page.wait("document.querySelector('article.model div')?.textContent")
    assert page.shown("#stop") and page.run("return document.getElementById('log').ariaBusy") == "true"
    page.wait(ANSWERED)
    whole = page.text("article.model div")
    assert whole.startswith(part) and len(whole) > len(part), "it came in pieces"
    assert page.text("article.user div") == "the\nlazy <b>dog</b>", "text, not markup"
    assert re.fullmatch(r"first token [\d.]+ s · [\d.]+ tokens/s · 40 tokens · token limit", page.text("#speed"))
    assert page.text("#said") == "Answer complete, 40 tokens."
    first = running.stats()["prompt_tokens"]
    page.type("#text", "fox" + ENTER)
    page.wait("document.querySelectorAll('article.model').length === 2")
    page.wait(ANSWERED)
    longer = running.stats()["prompt_tokens"] - first
    assert longer > 40, "the whole conversation is sent"
    page.click("#reset")
    assert page.run("return document.querySelectorAll('article').length") == 0 and page.shown("#hint")
    assert page.complaints() == []


@with_browser
@pytest.mark.parametrize("how", ["button", "escape", "reset"])
def test_stop_frees_the_engine_and_keeps_what_came(page: Page, running: Running, how: str) -> None:
    enter(page, running, max_tokens=1900)
    page.type("#text", "the quick brown fox" + ENTER)
    page.wait("document.querySelector('article.model div')?.textContent.length > 20")
    if how == "escape":
        page.type("#settings [name=seed]", ESCAPE)
    else:
        page.click("#stop" if how == "button" else "#reset")
    page.wait("document.getElementById('send').checkVisibility()")
    page.wait("document.getElementById('state').textContent.includes(' 0 running')")
    assert running.stats()["kv_cache_usage"] == 0
    if how == "reset":
        assert page.text("article") == "" and page.text("#speed") == ""
    else:
        assert len(page.text("article.model div")) > 20 and page.text("#speed").endswith("stopped")
    assert page.run("return document.getElementById('problem').hidden") and page.complaints() == []


@with_browser
def test_every_sampling_field_reaches_the_server(page: Page, running: Running) -> None:
    enter(page, running)
    fields = {
        "temperature": 0.5, "max_tokens": 7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3,
        "presence_penalty": -1, "frequency_penalty": 1.5, "repetition_penalty": 1.1,
    }  # fmt: skip
    for name, value in fields.items():
        set_field(page, name, value)
    assert page.run("return [...document.querySelectorAll('#settings [name]')].length") == len(fields)
    page.run(
        "const real = fetch; window.fetch = (path, how) => { if (how?.body) window.sent = how; return real(path, how) }"
    )
    page.type("#system", "Be brief.")
    page.type("#text", "dog" + ENTER)
    page.wait("document.getElementById('speed').textContent.includes('7 tokens')")
    sent = json.loads(page.run("return window.sent.body"))
    assert {name: sent[name] for name in fields} == fields
    assert sent["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "dog"}]
    assert page.run("return [Object.keys(sessionStorage), Object.keys(localStorage)]") == [["skymoe-key"], []]
    set_field(page, "top_p", 7)
    page.type("#text", "dog" + ENTER)
    assert page.run("return document.querySelectorAll('article.model').length") == 1, "the field complains"


@with_browser
def test_completions_go_on_from_the_text(page: Page, running: Running) -> None:
    enter(page, running)
    page.run("const m = document.getElementById('mode'); m.value = 'completion'; m.dispatchEvent(new Event('change'))")
    assert not page.shown("#system")
    page.type("#text", "lazy dog" + ENTER)
    page.wait(ANSWERED)
    first = page.text("article.model div")
    assert first.startswith("lazy dog") and len(first) > 9
    page.type("#text", ENTER)
    page.wait("document.querySelectorAll('article.model').length === 2")
    page.wait(ANSWERED)
    assert page.text("article.model:last-child .prompt") == first, "an empty box goes on from there"


@with_browser
def test_a_model_without_a_template_completes(page: Page, tmp_path: Path) -> None:
    model = make_model(tmp_path / "base")
    config = json.loads((model / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    with server(model) as running:
        enter(page, running)
        page.wait("document.getElementById('mode').value === 'completion'")
        page.type("#text", "the fox" + ENTER)
        page.wait(ANSWERED)
        assert page.text("article.model .prompt") == "the fox"


@with_browser
def test_the_heat_map_shows_each_expert_and_what_changed(page: Page, running: Running) -> None:
    enter(page, running)
    page.wait("document.querySelectorAll('#rows i').length === 4")
    page.type("#text", "the quick fox" + ENTER)
    page.wait("change[0][0] > 0 && !before[0].every((n, e) => n === change[0][e])")
    changed = page.run("return change")
    assert changed[0][0] > 0 and changed[0][1:] == [0, 0, 0], "expert 0 alone was given tokens since the last look"
    assert page.run("return document.querySelector('#rows i').style.opacity") == "1"
    label = page.run("return document.querySelector('#rows .row').ariaLabel")
    assert label.startswith("Layer 0: ") and label.endswith("most for expert 0, 4.0 times the mean; 3 of 4 idle")
    page.click("#total")
    page.wait("document.querySelectorAll('#rows i')[3].dataset.count === '2'")
    assert page.complaints() == []


@with_browser
@pytest.mark.parametrize("width", [320, 390, 800, 1920])
def test_no_width_scrolls_sideways(page: Page, running: Running, width: int) -> None:
    page.device(width, 640, dark=width == 390)
    enter(page, running)
    page.run("document.querySelectorAll('details').forEach((d) => { d.open = true })")
    page.type("#text", "dog" * 120 + ENTER)
    page.wait(ANSWERED)
    assert page.run("return document.documentElement.scrollWidth") <= width
    wide = (
        "return [...document.querySelectorAll('body *:not(.unseen)')].filter((e) => e.checkVisibility()"
        " && e.getBoundingClientRect().right > arguments[0] + 0.5).map((e) => e.outerHTML.slice(0, 80))"
    )
    assert page.run(wide, width) == []
    box = page.run("return document.getElementById('text').getBoundingClientRect().toJSON()")
    assert box["width"] > 150 and box["bottom"] < 640, "one can write without scrolling"


@with_browser
def test_every_control_has_a_name_and_the_theme_stays(page: Page, running: Running) -> None:
    enter(page, running)
    unnamed = (
        "return [...document.querySelectorAll('input,select,textarea,button')]"
        ".filter((e) => !(e.labels?.[0]?.textContent || e.textContent).trim()).map((e) => e.id)"
    )
    assert page.run(unnamed) == []
    ground = "return getComputedStyle(document.body).backgroundColor"
    light = page.run(ground)
    page.click("#theme")
    assert page.run(ground) != light
    page.run("location.reload()")
    page.wait("document.documentElement.dataset.theme === 'dark'")
    page.click("#theme")
    assert page.run(ground) == light


@with_browser
def test_nothing_that_is_added_to_the_page_runs(page: Page, running: Running) -> None:
    enter(page, running)
    page.run(
        "window.seen = [];"
        "document.addEventListener('securitypolicyviolation', (e) => { window.seen.push(e.effectiveDirective) })"
    )
    page.run("const s = document.createElement('script'); s.append('window.ran = 1'); document.body.append(s)")
    for markup in ("p.setAttribute('onclick', 'ran = 1')", "p.innerHTML = '<img src=x onerror=ran=1>'"):
        script = f"const p = document.createElement('p'); try {{ {markup} }} catch {{ return 'refused' }}"
        assert page.run(script) == "refused"
    page.run("fetch('http://127.0.0.2:1/').catch(() => { window.refused = true })")
    page.wait("window.refused")
    assert page.run("return typeof window.ran") == "undefined"
    seen = set(page.run("return window.seen"))
    assert seen >= {"connect-src", "require-trusted-types-for"}


@with_browser
def test_a_full_server_is_asked_again_until_it_has_room(page: Page, model: Path) -> None:
    with server(model, engine={"step_s": 0.02}, limits={"tokens": 1}) as running, running.client() as other:
        enter(page, running)
        with other.stream(
            "POST", "/v1/completions", json={"prompt": "dog", "max_tokens": 1500, "stream": True}
        ) as held:
            lines = held.iter_lines()
            next(lines)
            page.type("#text", "fox" + ENTER)
            page.wait(
                "/The server is busy: .*Trying again in 1 s/.test(document.getElementById('problem').textContent)"
            )
        page.wait(ANSWERED)
        assert not page.shown("#problem") and page.text("#said") == "Answer complete, 12 tokens."


@with_browser
def test_what_goes_wrong_is_said(page: Page, running: Running, model: Path) -> None:
    """Too long a question comes back to be shortened; a wrong key; a request that the engine gives up; no server."""
    enter(page, running)
    page.run("document.getElementById('text').value = 'dog '.repeat(3000)")
    page.type("#text", ENTER)
    page.wait("document.getElementById('problem').checkVisibility()")
    assert "2048" in page.text("#problem") and page.text("article") == ""
    assert page.run("return document.getElementById('text').value.length") == 12000
    page.run("document.getElementById('key').value = 'x'; document.getElementById('text').value = 'dog'")
    page.type("#text", ENTER)
    page.wait("document.getElementById('problem').textContent.includes('needs its API key')")
    assert page.run("return document.activeElement.id") == "key"
    with server(model, engine={"load_s": 3, "most": 5, "fail": 0}) as other:
        enter(page, other)
        page.type("#text", "dog" + ENTER)
        page.wait(ANSWERED)
        other.process.kill()
        other.process.wait()
        page.type("#text", "dog" + ENTER)
        page.wait("document.getElementById('problem').textContent === 'The server cannot be reached.'")
        page.wait("document.getElementById('state').textContent === 'not reachable'")


@with_browser
@pytest.mark.slow
def test_before_a_real_model(page: Page, tmp_path: Path) -> None:
    """`skymoe serve` as a user starts it, with random weights."""
    from engine.models import write_model

    model = write_model(
        tmp_path / "random-qwen3-moe", "qwen3_moe", vocab_size=300, num_layers=16, moe_layers=tuple(range(16)),
        max_position=4096, moe=MoESpec(num_experts=16, top_k=2, ffn_size=20, norm_topk=True),
    )  # fmt: skip
    make_model(model)
    command = [sys.executable, "-m", "skymoe", "serve", str(model), "--port", "0", "--max-model-len", "1024"]
    environment = {**os.environ, "SKYMOE_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said.startswith("ready http://")
        running = Running(process, url=said.split()[1])
        page.device(1280, 720)
        enter(page, running, max_tokens=160)
        set_field(page, "temperature", 3)
        set_field(page, "seed", 7)
        page.type("#text", "the quick brown fox" + ENTER)
        page.wait("document.querySelectorAll('#rows i').length === 256")
        page.wait("document.getElementById('heat-note').textContent === 'Tokens per expert since the last look.'")
        page.wait(ANSWERED)
        page.type("#text", "and the lazy dog" + ENTER)
        page.wait("document.querySelectorAll('article.model').length === 2")
        page.click("#stop")
        page.wait("document.getElementById('state').textContent.includes(' 0 running')")
        assert page.complaints() == []
    finally:
        process.terminate()
        assert process.wait(60) == 0
