"""A headless Chromium without a network, spoken to over two pipes: what a page logs, asks for, shows.

    with Browser() as browser:
        page = browser.open(path, width=1280, height=900, dark=True)
        page.run("document.title"), page.problems, page.requests
        page.screenshot(tmp_path / "page.png")
"""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-pipe", "--force-color-profile=srgb",
)  # fmt: skip
ANSWER_SECONDS = 30.0


class BrowserMissing(Exception):
    """No Chromium is to be had; the message says why."""


def find_browser() -> str:
    """Chromium's path; it is installed by apt-get first where root may do so. Raises BrowserMissing."""
    if found := _installed():
        return found
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise BrowserMissing("no Chromium here: apt-get install chromium")
    environment = dict(os.environ) | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
        done = subprocess.run(
            ["apt-get", "-qq", *command], env=environment, capture_output=True, text=True, check=False, timeout=240
        )
        if done.returncode:
            raise BrowserMissing(f"apt-get cannot install Chromium: {(done.stderr or done.stdout).strip()[-200:]}")
    if found := _installed():
        return found
    raise BrowserMissing("the package chromium brought no program of that name")


def _installed() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name)) is not None), None)


class Browser:
    """The process. Raises BrowserMissing where there is none to start."""

    def __init__(self) -> None:
        program = find_browser()
        self._folder = tempfile.mkdtemp(prefix="megamoe-browser-")
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        # It reads from descriptor 3 and writes to 4. Both ends stand above while they are put there.
        shell = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, program, *FLAGS, f"--user-data-dir={self._folder}", "about:blank"],
            pass_fds=(to_read, to_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=os.environ | {"HOME": self._folder},
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        self._number, self._buffer = 0, b""
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *details: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)
        shutil.rmtree(self._folder, ignore_errors=True)

    def open(self, path: Path, **options: Any) -> "Page":
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        return Page(self, session, path, **options)

    def call(self, method: str, params: dict[str, Any] | None = None, session: str | None = None) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params or {}}
        os.write(self._write, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        until = time.monotonic() + ANSWER_SECONDS
        while True:
            answer = self.next_message(until - time.monotonic())
            if answer is None:
                raise TimeoutError(f"Chromium did not answer {method} in {ANSWER_SECONDS:g} s")
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def next_message(self, timeout_seconds: float) -> dict[str, Any] | None:
        until = time.monotonic() + timeout_seconds
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, until - time.monotonic()))
            data = os.read(self._read, 1 << 20) if ready else b""
            if not data:
                return None
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


class Page:
    def __init__(
        self, browser: Browser, session: str, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False,
        with_script: bool = True, scale: float = 1.0,
    ) -> None:  # fmt: skip
        self._browser, self._session, self.url = browser, session, path.resolve().as_uri()
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.call("Emulation.setScriptExecutionDisabled", {"value": not with_script})
        self.call("Page.navigate", {"url": self.url})
        until = time.monotonic() + ANSWER_SECONDS
        while not any(self._is_mine(event, "Page.loadEventFired") for event in self._browser.events):
            event = browser.next_message(until - time.monotonic())
            if event is None:
                raise TimeoutError(f"{self.url} did not load")
            browser.events.append(event)

    def call(self, method: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
        return self._browser.call(method, params, self._session)

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", {"expression": expression, "returnByValue": True, "awaitPromise": True})
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def point_at(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y})

    @property
    def problems(self) -> list[str]:
        """Everything that was logged or thrown."""
        self.run("0")  # what came before has been told
        names = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self._browser.events if self._is_mine(event, *names)]

    @property
    def requests(self) -> list[str]:
        """What it asked for, besides itself and what it carries."""
        found = [
            event["params"]["request"]["url"]
            for event in self._browser.events
            if self._is_mine(event, "Network.requestWillBeSent")
        ]
        return [url for url in found if url != self.url and not url.startswith("data:")]

    def screenshot(self, path: Path, *, whole: bool = False) -> Path:
        picture = self.call("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": whole})
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
            picture = self.call(
                "Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True, "clip": clip}
            )
        path.write_bytes(base64.b64decode(picture["data"]))
        return path

    def _is_mine(self, event: dict[str, Any], *methods: str) -> bool:
        return event.get("sessionId") == self._session and event.get("method") in methods
