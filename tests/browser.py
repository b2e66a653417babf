"""Drive a headless Chromium over the DevTools protocol, for the tests of the web page."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WAIT = 60  # seconds until a browser or a page must have done something; the machine may be busy


class Page:
    """A tab of the browser. `errors` collects what a page must not do."""

    def __init__(self, socket: Any, session: str) -> None:
        self._socket = socket
        self._session = session
        self._number = 0
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.loads = 0
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command, and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, "sessionId": self._session}
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv(timeout=WAIT))
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        name = event.get("method")
        facts = event.get("params", {})
        if name == "Runtime.exceptionThrown":
            self.errors.append(facts["exceptionDetails"].get("exception", {}).get("description", "exception"))
        elif name == "Log.entryAdded" and facts["entry"]["level"] in ("error", "warning"):
            self.errors.append(facts["entry"]["text"])
        elif name == "Runtime.consoleAPICalled" and facts["type"] in ("error", "warning", "assert"):
            self.errors.append(str(facts["args"]))
        elif name == "Page.javascriptDialogOpening":
            self.errors.append(f"dialog {facts['message']}")
        elif name == "Network.requestWillBeSent":
            self.requests.append(facts["request"]["url"])
        elif name == "Page.loadEventFired":
            self.loads += 1

    def open(self, url: str) -> None:
        loads = self.loads
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")
        assert self.loads >= loads

    def run(self, script: str) -> Any:
        """Evaluate an expression in the page, and return its value. A promise is awaited."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = WAIT) -> None:
        """Wait until an expression in the page is true."""
        end = time.monotonic() + seconds
        while not self.run(condition):
            assert time.monotonic() < end, f"not true within {seconds} s: {condition}"
            time.sleep(0.05)

    def size(self, width: int, height: int = 900, dark: bool = False) -> None:
        """Show the page as on a screen of this size."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def mouse(self, kind: str, x: float, y: float) -> None:
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def click(self, css: str) -> None:
        """Press the middle of an element, as a user does."""
        x, y = self.middle(css)
        self.mouse("mousePressed", x, y)
        self.mouse("mouseReleased", x, y)

    def middle(self, css: str) -> tuple[float, float]:
        self.run(f"document.querySelector({json.dumps(css)}).scrollIntoView({{block: 'center'}})")
        x, y = self.run(
            f"(() => {{const b = document.querySelector({json.dumps(css)}).getBoundingClientRect();"
            "return [b.x + b.width / 2, b.y + b.height / 2];})()"
        )
        return x, y

    def type(self, text: str) -> None:
        self.send("Input.insertText", text=text)

    def key(self, name: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=name, code=name)

    def pdf(self) -> bytes:
        return base64.b64decode(self.send("Page.printToPDF", preferCSSPageSize=True)["data"])

    def picture(self, file: Path) -> None:
        """Write a picture of the whole page."""
        data = self.send("Page.captureScreenshot", captureBeyondViewport=True, clip=self._whole())["data"]
        file.write_bytes(base64.b64decode(data))

    def _whole(self) -> dict[str, float]:
        width, height = self.run(
            "[document.documentElement.clientWidth, document.documentElement.scrollHeight]"
        )
        return {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}


def axe_file() -> Path | None:
    """Return axe-core, which the package axe-core-python contains, or None."""
    given = os.environ.get("AXE_CORE")
    if given:
        return Path(given)
    spec = importlib.util.find_spec("axe_core_python")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).with_name("axe.min.js")


def accessibility_faults(page: Page) -> list[str]:
    """Return the faults that axe-core finds in the page as it is now."""
    file = axe_file()
    assert file is not None
    page.run(f"{file.read_text(encoding='utf-8')};0")
    rules = page.run("axe.run(document).then((r) => r.violations)")
    faults = []
    for rule in rules:
        for node in rule["nodes"]:
            faults.append(f"{rule['id']}: {node['html'][:160]} ({node['failureSummary'][:200]})")
    return faults


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """Start a browser with a new profile, and yield its page."""
    from websockets.sync.client import connect

    assert CHROMIUM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run"]
    options += [f"--user-data-dir={folder / 'profile'}", "--disable-background-networking", "about:blank"]
    process = subprocess.Popen(
        [CHROMIUM, *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"HOME": str(folder)},
    )
    try:
        file = folder / "profile" / "DevToolsActivePort"
        end = time.monotonic() + WAIT
        while not (file.is_file() and len(file.read_text().split()) == 2):
            assert time.monotonic() < end and process.poll() is None, "the browser did not start"
            time.sleep(0.05)
        port, path = file.read_text().split()
        with connect(f"ws://127.0.0.1:{port}{path}", max_size=None) as socket:
            yield _new_page(socket)
    finally:
        process.terminate()
        process.wait()


def _new_page(socket: Any) -> Page:
    def ask(number: int, method: str, **parameters: Any) -> dict[str, Any]:
        socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(socket.recv(timeout=WAIT))
            if answer.get("id") == number:
                return dict(answer["result"])

    target = ask(1_000_001, "Target.createTarget", url="about:blank")["targetId"]
    return Page(socket, ask(1_000_002, "Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
