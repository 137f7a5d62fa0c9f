"""A real Chromium for tests of pages: started headless, driven over the DevTools protocol."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from urllib.request import urlopen

from websockets.sync.client import connect


# None where no Chromium is installed.
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --remote-debugging-port=0 about:blank"
).split()


class Chromium:
    """One browser with one page. A context manager: the process ends with the block.

    Attributes:
        messages: console errors, uncaught exceptions and requests that left the file, as the browser reported them.
    """

    def __init__(self, executable: str, profile: Path, size: tuple[int, int] = (1400, 900)) -> None:
        self._command = [executable, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}", *_FLAGS]
        self._port_file = profile / "DevToolsActivePort"
        self._stack = ExitStack()
        self._number = 0
        self.messages: list[str] = []

    def __enter__(self) -> Chromium:
        with self._stack:  # ends the process if the start fails half-way
            process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            self._stack.callback(process.wait, 20)
            self._stack.callback(process.terminate)
            port = self._wait_for(lambda: self._port_file.read_text().splitlines()[0])
            url = self._wait_for(lambda: self._page_url(port))
            self._socket = self._stack.enter_context(connect(url, max_size=None))
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @staticmethod
    def _page_url(port: str) -> str:
        targets = json.load(urlopen(f"http://127.0.0.1:{port}/json/list", timeout=5))
        return next(target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page")

    @staticmethod
    def _wait_for(get, seconds: float = 30):
        deadline = time.monotonic() + seconds
        while True:
            try:
                return get()
            except (OSError, IndexError, StopIteration):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def call(self, method: str, **parameters) -> dict:
        """Send one command and return its result; events that come in between are looked through for errors."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") == self._number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self._note(message)

    def _note(self, message: dict) -> None:
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.messages.append(json.dumps(parameters["exceptionDetails"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.messages.append(parameters["entry"]["text"])
        elif method == "Network.requestWillBeSent" and not parameters["request"]["url"].startswith(("file:", "data:")):
            self.messages.append(f"request to {parameters['request']['url']}")

    def open(self, path: Path, fragment: str = "") -> None:
        """Load a local file and wait until its scripts have run."""
        self.call("Page.navigate", url=f"{path.resolve().as_uri()}{fragment}")
        self.wait("document.readyState === 'complete'")

    def evaluate(self, expression: str):
        """Return the JSON value of a JavaScript expression; promises are awaited."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def wait(self, expression: str, seconds: float = 30) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + seconds
        while not self.evaluate(expression):
            if time.monotonic() > deadline:
                raise TimeoutError(f"never true: {expression}")
            time.sleep(0.02)

    def press(self, key: str) -> None:
        """Press and release a key, as a person would."""
        text = key if len(key) == 1 else ""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, text=text if kind == "keyDown" else "")

    def type(self, text: str) -> None:
        """Put text into the element that has the focus."""
        self.call("Input.insertText", text=text)

    def prefer(self, scheme: str) -> None:
        """Pretend that the user prefers a `light` or `dark` page."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
