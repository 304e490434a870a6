"""Headless Chromium, driven over its DevTools protocol by a pipe: no port, no driver and no further package."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from waiting import until

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-dev-shm-usage",  # a container may have little of it
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
# Chromium reads commands from descriptor 3 and writes to 4; whatever those are here, they become so there.
LAUNCH = """
import os, sys
commands, answers = (os.dup2(int(n), 100 + i) for i, n in enumerate(sys.argv[1:3]))
os.dup2(commands, 3), os.dup2(answers, 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""


def chromium() -> str | None:
    """Where an installed Chromium is, None if there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page. Every command waits for its answer; errors and network requests of the page are kept."""

    def __init__(self, commands: IO[bytes], answers: IO[bytes]) -> None:
        self._commands = commands
        self._answers = answers
        self._rest = b""
        self._number = 0
        self._session: str | None = None
        self.problems: list[str] = []  # console errors and warnings, uncaught exceptions
        self.requests: list[str] = []  # of the network, that is, of nothing but data: and the page itself
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        content = json.dumps(message).encode() + b"\0"
        while content:
            content = content[self._commands.write(content) :]
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            content = os.read(self._answers.fileno(), 1 << 16)
            assert content, "Chromium is gone"
            self._rest += content
        message, self._rest = self._rest.split(b"\0", 1)
        answer = json.loads(message)
        self._note(answer.get("method"), answer.get("params", {}))
        return answer

    def _note(self, event: str | None, params: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(params["exceptionDetails"]))
        if event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(json.dumps(params["args"]))
        if event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(params["entry"]["text"])
        if event == "Network.requestWillBeSent" and not params["request"]["url"].startswith(("data:", "file:")):
            self.requests.append(params["request"]["url"])

    def open(self, path: Path, fragment: str = "") -> None:
        """Load a file and wait until its script is through."""
        self.call("Page.navigate", url=f"{path.as_uri()}{fragment}")
        self.wait("document.readyState === 'complete' && 'ready' in document.documentElement.dataset")

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = 30) -> None:
        until(lambda: self.run(condition), seconds)

    def press(self, key: str, code: int, text: str = "") -> None:
        """A key as the keyboard gives it: `code` is its Windows virtual key code."""
        key_down = {"type": "keyDown" if text else "rawKeyDown", "text": text} if text else {"type": "rawKeyDown"}
        self.call("Input.dispatchKeyEvent", key=key, code=key, windowsVirtualKeyCode=code, **key_down)
        self.call("Input.dispatchKeyEvent", key=key, code=key, windowsVirtualKeyCode=code, type="keyUp")

    def show(self, width: int, height: int, dark: bool = False, phone: bool = False) -> None:
        """The size of the window and the colours that the system asks for."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        content = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(content))


@contextlib.contextmanager
def browse(program: str) -> Iterator[Browser]:
    """A browser of its own, with an empty profile; gone at the end."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        commands, write = os.pipe()
        read, answers = os.pipe()
        arguments = [program, *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(commands), str(answers), *arguments],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(commands)
        os.close(answers)
        try:
            with os.fdopen(write, "wb", buffering=0) as to_browser, os.fdopen(read, "rb", buffering=0) as from_browser:
                yield Browser(to_browser, from_browser)
        finally:
            process.terminate()
            process.wait(30)
