"""A server in a process of its own, with the echo engine behind it. `with server(...) as running: running.url`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

KEY = "a-key-of-the-tests-0123456789"
TEMPLATE = (
    "{% for message in messages %}"
    "{% if 'refuse me' in message.content %}{{ raise_exception('as you wish') }}{% endif %}"
    "{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ENGINE = Path(__file__).parent / "echo_engine.py"

_MAIN = """if True:
    import json, sys
    from skymoe.base.config import check_config
    from skymoe.base.errors import SkymoeError
    from skymoe.base.log import setup_logging
    from skymoe.serve.config import ServeConfig
    from skymoe.serve.run import run
    setup_logging()
    try:
        code = run(check_config(ServeConfig, json.loads(sys.argv[1])), engine_command=json.loads(sys.argv[2]))
    except SkymoeError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    assert "torch" not in sys.modules
    sys.exit(code)
"""


def make_model(path: Path) -> Path:
    """A directory with a byte-level tokenizer of 300 tokens and a chat template."""
    from skymoe.data.tokenizer import train_tokenizer

    train_tokenizer(["the quick brown fox jumps over the lazy dog " * 8, "äöü € 漢字 the the the"], 300).save(path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return path


@dataclass
class Running:
    """A server that runs."""

    process: subprocess.Popen[str]
    url: str = ""
    errors: list[str] = field(default_factory=list)
    key: str = KEY

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=self.headers, timeout=60, trust_env=False, **options)

    def stats(self) -> dict[str, Any]:
        with self.client() as client:
            return dict(client.get("/stats").json())

    def log(self) -> str:
        return "".join(self.errors)

    def wait(self, seconds: float = 30) -> int:
        return self.process.wait(seconds)

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.wait()


def start(
    model: Path,
    *,
    engine: dict[str, Any] | None = None,
    key: str = KEY,
    ready: bool = True,
    env: dict[str, str] | None = None,
    **config: Any,
) -> Running:
    options = {"port": 0, **config, "engine": {"model": str(model), "max_batch": 64, **config.get("engine", {})}}
    environment = {
        **os.environ, "SKYMOE_API_KEY": key, "ECHO_ENGINE": json.dumps(engine or {}),
        "PYTHONPATH": str(Path(__file__).parents[2]), **(env or {}),
    }  # fmt: skip
    command = json.dumps([sys.executable, str(ENGINE)])
    process = subprocess.Popen(
        [sys.executable, "-c", _MAIN, json.dumps(options), command], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    running = Running(process, key=key)
    assert process.stderr is not None and process.stdout is not None
    threading.Thread(target=lambda: running.errors.extend(process.stderr), daemon=True).start()  # type: ignore[arg-type]
    if ready:
        line = process.stdout.readline()
        assert line.startswith("ready http://"), (line, process.wait(10), running.log())
        running.url = line.split()[1]
    return running


def engine_of(running: Running) -> psutil.Process:
    """The process of the echo engine."""
    children = psutil.Process(running.process.pid).children()
    return next(child for child in children if str(ENGINE) in child.cmdline())


@contextmanager
def server(model: Path, **options: Any) -> Iterator[Running]:
    running = start(model, **options)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.process.send_signal(signal.SIGTERM)
            running.process.send_signal(signal.SIGTERM)
            try:
                running.process.wait(20)
            except subprocess.TimeoutExpired:
                running.process.kill()
                running.process.wait()
