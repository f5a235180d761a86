"""A headless Chromium driven over its DevTools protocol: what a page is like in a real browser.

Needs the program and the package websockets, which vLLM's server brings, and nothing from the network.
"""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def program() -> str | None:
    """The browser of this machine; None = there is none."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Browser:
    """One page of one headless browser.

    Example:
        >>> with Browser() as browser:  # doctest: +SKIP
        ...     browser.open(Path("report.html"), width=400)
        ...     browser.js("document.title")
    """

    def __enter__(self) -> Browser:
        found = program()
        assert found is not None
        self._open = ExitStack()
        self._folder = self._open.enter_context(
            tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        )
        switches = [
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--remote-debugging-port=0", f"--user-data-dir={self._folder}", "about:blank"),
        ]
        self._process = subprocess.Popen([found, *switches], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._open.callback(self._end)
        port = self._port()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=30) as reply:
            pages = json.load(reply)
        address = next(one["webSocketDebuggerUrl"] for one in pages if one["type"] == "page")
        self._socket = self._open.enter_context(connect(address, max_size=None))
        self._ids = itertools.count(1)
        self.errors: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _end(self) -> None:
        self._process.terminate()
        self._process.wait(30)

    def _port(self) -> str:
        ready = Path(self._folder) / "DevToolsActivePort"
        for _ in range(300):
            if ready.exists() and (lines := ready.read_text().splitlines()):
                return lines[0]
            time.sleep(0.1)
        raise TimeoutError("the browser did not start within 30 s")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol; what the page logged as an error meanwhile is kept."""
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") == number:
                assert "error" not in message, message
                return dict(message["result"])
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(message["params"]["exceptionDetails"]))
        if message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
            self.errors.append(message["params"]["entry"]["text"])

    def open(self, page: Path, width: int = 1400, height: int = 900, is_dark: bool = False, anchor: str = "") -> None:
        """Load a page at a size, light or dark, and wait until it is there."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.call("Emulation.setEmulatedMedia", media="", features=[scheme])
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=page.resolve().as_uri() + (f"#{anchor}" if anchor else ""))
        for _ in range(600):
            if self.js("document.readyState === 'complete' && location.protocol === 'file:'"):
                return
            time.sleep(0.05)
        raise TimeoutError(f"{page} did not load within 30 s")

    def js(self, expression: str) -> Any:
        """The value of an expression in the page."""
        reply = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def key(self, name: str) -> None:
        """Press a key, by its DOM name."""
        key = {"key": name, "code": name, "windowsVirtualKeyCode": _CODES[name]}
        self.call("Input.dispatchKeyEvent", type="keyDown", **key, **({"text": "\r"} if name == "Enter" else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **key)

    def point(self, selector: str) -> None:
        """Move the mouse over the first element that a selector finds, scrolled into view."""
        x, y = self.js(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
            " return [r.x + r.width / 2, r.y + r.height / 3]; })()"
        )
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def print_media(self) -> None:
        """Show the page as it is printed."""
        self.call("Emulation.setEmulatedMedia", media="print")
        self.js("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def shoot(self, path: Path) -> None:
        """A picture of what is seen."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


_CODES = {"Enter": 13, "Tab": 9, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
