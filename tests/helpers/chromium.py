"""A headless Chromium for tests, driven over the DevTools protocol; nothing but aiohttp is needed."""

import asyncio
import base64
import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

_FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --disable-dev-shm-usage --remote-debugging-port=0"
)
_WITHIN_S = 120.0


def find_chromium() -> str:
    """The program's path. Without one the test is skipped, or fails where $MICOTA_REQUIRE_CHROMIUM is set."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found:
        return found
    message = "no Chromium here; on Debian: apt-get install chromium"
    if os.environ.get("MICOTA_REQUIRE_CHROMIUM"):
        pytest.fail(message)
    pytest.skip(message)


@contextlib.contextmanager
def browsing(profile: Path) -> Iterator["Tab"]:
    """One tab of a browser of its own, which is gone afterwards; `profile` is a folder that does not exist yet."""
    command = [find_chromium(), *_FLAGS.split(), f"--user-data-dir={profile}", "about:blank"]
    with (profile.parent / "chromium.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    loop = asyncio.new_event_loop()
    try:
        tab = Tab(loop, _port(profile, process))
        yield tab
        loop.run_until_complete(tab.close())
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        loop.close()


def _port(profile: Path, process: subprocess.Popen[bytes]) -> int:
    file, until = profile / "DevToolsActivePort", time.monotonic() + _WITHIN_S
    while time.monotonic() < until:
        if file.exists() and (lines := file.read_text().splitlines()):
            return int(lines[0])
        assert process.poll() is None, f"Chromium ended: {(profile.parent / 'chromium.log').read_text()[-2000:]}"
        time.sleep(0.05)
    raise TimeoutError("Chromium opened no DevTools port")


class Tab:
    """`complaints` are console errors and warnings, exceptions and refusals by the content security policy; `requests`
    the addresses asked for, both since the last `open`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, port: int) -> None:
        self._loop, self._number = loop, 0
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._loaded = False
        self._session, self._socket = loop.run_until_complete(self._connect(port))
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.call(f"{domain}.enable")

    async def _connect(self, port: int) -> tuple[aiohttp.ClientSession, aiohttp.ClientWebSocketResponse]:
        session = aiohttp.ClientSession()
        async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            targets = await answer.json()
        address = next(target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page")
        return session, await session.ws_connect(address, max_msg_size=0)

    async def close(self) -> None:
        await self._socket.close()
        await self._session.close()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result; events that come meanwhile are noted."""
        return self._loop.run_until_complete(asyncio.wait_for(self._call(method, parameters), _WITHIN_S))

    async def _call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json()
            if message.get("id") == self._number:
                assert "error" not in message, f"{method}: {message['error']}"
                result: dict[str, Any] = message["result"]
                return result
            self._note(message.get("method", ""), message.get("params", {}))

    def _note(self, method: str, event: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.complaints.append(str(event["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and event["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(event["args"]))
        elif method == "Log.entryAdded" and event["entry"]["level"] in ("error", "warning"):
            self.complaints.append(event["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(event["request"]["url"])
        elif method == "Page.loadEventFired":
            self._loaded = True

    def open(self, file: Path, width: int = 1280, height: int = 900) -> None:
        """Show a file in a window of this many CSS pixels."""
        self.complaints, self.requests, self._loaded = [], [], False
        self.resize(width, height)
        self.call("Page.navigate", url=file.as_uri())
        until = time.monotonic() + _WITHIN_S
        while not self._loaded:
            assert time.monotonic() < until, f"{file} was not loaded"
            self.evaluate("0")

    def resize(self, width: int, height: int = 900) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def evaluate(self, expression: str) -> Any:
        """The value of JavaScript, which may be a promise."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Until it is true."""
        until = time.monotonic() + _WITHIN_S
        while not self.evaluate(expression):
            assert time.monotonic() < until, f"never came true: {expression}"
            time.sleep(0.02)

    def press(self, *keys: str) -> None:
        """Press keys one after the other: characters, or names (Tab, Enter, ArrowDown, Space ...), also Shift+NAME."""
        codes = {"Tab": 9, "Enter": 13, "ArrowDown": 40, "ArrowUp": 38, "ArrowRight": 39, "Escape": 27, "End": 35}
        for key in keys:
            shift, _, name = key.rpartition("+") if len(key) > 1 else ("", "", key)
            text = {"Enter": "\r", "Space": " "}.get(name, name if len(name) == 1 else "")
            named = {"key": " " if name == "Space" else name, "code": name, "modifiers": 8 if shift else 0}
            named["windowsVirtualKeyCode"] = codes.get(name, ord(text.upper()) if text else 0)
            self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **named)
            self.call("Input.dispatchKeyEvent", type="keyUp", **named)

    def printed(self) -> bytes:
        """The page as PDF, A4."""
        return base64.b64decode(self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)["data"])
