"""A browser, driven by the WebDriver protocol over plain HTTP: `with browser(folder) as page: page.open(url)`.

Chromium without a window; it can reach this machine only, so that a page that asks another host for anything shows.

    PYTHONPATH=tests python -m serve.browser URL QUESTION FILE.png     a picture of the chat page, during an answer
"""

from __future__ import annotations

import base64
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

ENTER, ESCAPE, SHIFT = "\ue007", "\ue00c", "\ue008"
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
_PATIENCE_S = 30.0
_FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
    "--disable-component-update", "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
    "--window-size=1280,800",
]  # fmt: skip


def find_browser() -> tuple[str, str] | None:
    """Chromium and its driver, where both are installed."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    return (chromium, driver) if chromium and driver else None


class Page:
    """One tab."""

    def __init__(self, driver: httpx.Client, session: str) -> None:
        self._driver = driver
        self._session = session

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        answer = self._driver.request(method, f"/session/{self._session}{path}", json=body)
        value = answer.json()["value"]
        assert answer.status_code == 200, value
        return value

    def open(self, url: str) -> None:
        self._ask("POST", "/url", {"url": url})

    def run(self, script: str, *args: Any) -> Any:
        """The value of `script`, the body of a function."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": list(args)})

    def _element(self, css: str) -> str:
        return str(self._ask("POST", "/element", {"using": "css selector", "value": css})[_ELEMENT])

    def type(self, css: str, keys: str) -> None:
        self._ask("POST", f"/element/{self._element(css)}/value", {"text": keys})

    def click(self, css: str) -> None:
        self._ask("POST", f"/element/{self._element(css)}/click", {})

    def shown(self, css: str) -> bool:
        return bool(self._ask("GET", f"/element/{self._element(css)}/displayed"))

    def text(self, css: str) -> str:
        """The text of all that `css` names, as the document has it."""
        script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent).join('|')"
        return str(self.run(script, css))

    def wait(self, condition: str, *args: Any) -> Any:
        """Until the expression `condition` is true, its value."""
        end = time.monotonic() + _PATIENCE_S
        while not (value := self.run(f"return {condition}", *args)):
            assert time.monotonic() < end, (condition, args, self.text("body > main"), self.complaints())
            time.sleep(0.05)
        return value

    def device(self, width: int, height: int, *, dark: bool = False) -> None:
        """A screen of so many CSS pixels."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._devtools("Emulation.setDeviceMetricsOverride", metrics)
        media = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._devtools("Emulation.setEmulatedMedia", {"features": media})

    def _devtools(self, command: str, params: dict[str, Any]) -> None:
        self._ask("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

    def complaints(self) -> list[str]:
        """What the browser's console has to say since the last time: errors, refused requests, the policy."""
        entries = self._ask("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._ask("GET", "/screenshot")))


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A browser with an empty profile in `folder`."""
    found = find_browser()
    assert found is not None
    chromium, program = found
    command = [program, "--port=0", "--allowed-ips=127.0.0.1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        said = next(line for line in process.stdout if "successfully on port" in line)
        port = int(said.rstrip(".\n").rsplit(" ", 1)[1])
        options = {"binary": chromium, "args": [*_FLAGS, f"--user-data-dir={folder / 'profile'}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False) as driver:
            answer = driver.post("/session", json={"capabilities": {"alwaysMatch": wanted}}).json()["value"]
            assert "sessionId" in answer, answer
            try:
                yield Page(driver, answer["sessionId"])
            finally:
                driver.delete(f"/session/{answer['sessionId']}")
    finally:
        process.terminate()
        process.wait(30)


def take_picture(url: str, question: str, file: Path) -> None:
    """The page of the server at `url`, which wants no key, after half of 200 tokens."""
    with tempfile.TemporaryDirectory() as folder, browser(Path(folder)) as page:
        page.device(1280, 760)
        page.open(url)
        page.wait("document.getElementById('state')?.textContent.startsWith('ready')")
        page.run("document.querySelector('[name=max_tokens]').value = 200")
        page.type("#text", question + ENTER)
        page.wait("parseInt(document.getElementById('speed').textContent.split(' · ')[2] ?? 0) >= 100")
        page.screenshot(file)


if __name__ == "__main__":
    take_picture(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
