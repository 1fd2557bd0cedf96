"""A model goes to a stand-in for the hub as a commit of its files; what would fail is said before any work."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from micota_fast.errors import InputError
from micota_fast.model.hub_upload import require_upload

UPLOAD = "import sys; from pathlib import Path; from micota_fast.model.hub_upload import upload\n"
UPLOAD += "upload(Path(sys.argv[1]), 'org/name')"


class Hub(ThreadingHTTPServer):
    """Keeps what is made and committed; answers every write with `refusal`, if that is set."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.made: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.there: list[str] = []  # before the upload
        self.deleted: list[str] = []
        self.tokens: set[str | None] = set()
        self.refusal = 0


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, value: Any, status: int = 200) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        if "/tree/" in self.path:
            self._answer([{"type": "file", "path": path, "oid": "0" * 40, "size": 1} for path in self.server.there])
            return
        files = [{"rfilename": path} for path in self.server.there]
        self._answer({"id": "org/name", "sha": "0" * 40, "siblings": files})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.tokens.add(self.headers.get("Authorization"))
        address = str(self.server.server_address[1])
        if self.server.refusal:
            self._answer({"error": "no"}, self.server.refusal)
        elif self.path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            self._answer({"url": f"http://127.0.0.1:{address}/org/name"})
        elif "/preupload/" in self.path:
            named = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in named]
            self._answer({"files": files})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "deletedFile":
                    self.server.deleted.append(entry["value"]["path"])
            made = {
                "commitOid": "1" * 40,
                "commitUrl": f"http://127.0.0.1:{address}/org/name/commit/1",
                "success": True,
            }
            self._answer(made)
        else:
            self._answer({"errors": [], "warnings": []})


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def upload(hub: Hub, folder: Path) -> subprocess.CompletedProcess[str]:
    endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
    own = {"HF_ENDPOINT": endpoint, "HF_TOKEN": "secret", "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder.parent / "home")}
    command = [sys.executable, "-c", UPLOAD, str(folder)]
    return subprocess.run(command, env=os.environ | own, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


def test_every_file_is_committed_to_a_private_repository(hub: Hub, model: Path) -> None:
    done = upload(hub, model)
    assert done.returncode == 0, done.stderr
    assert hub.files == {path.name: path.read_bytes() for path in model.iterdir()}
    (made,) = hub.made
    assert (made["organization"], made["name"]) == ("org", "name")
    assert made.get("private") is True or made.get("visibility") == "private"
    assert hub.tokens == {"Bearer secret"}


def test_weights_of_an_earlier_upload_do_not_stay_beside_the_new_ones(hub: Hub, model: Path) -> None:
    stale = ["adapter_config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    hub.there = [".gitattributes", "README.md", "notes.txt", *stale]
    done = upload(hub, model)
    assert done.returncode == 0, done.stderr
    assert sorted(hub.deleted) == stale


def test_a_hub_that_cannot_be_reached_is_an_error_that_says_what_to_do(hub: Hub, model: Path) -> None:
    hub.shutdown()
    hub.server_close()
    done = upload(hub, model)
    assert f"InputError: {model} is finished but was not uploaded to org/name" in done.stderr


def test_a_refusal_says_that_the_model_is_kept_and_what_to_do(hub: Hub, model: Path) -> None:
    hub.refusal = 403
    done = upload(hub, model)
    assert done.returncode != 0
    said = done.stderr.splitlines()
    assert any(
        "InputError" in line and f"{model} is finished but was not uploaded to org/name" in line for line in said
    )
    assert "rerun the same command" in done.stderr


@pytest.mark.parametrize("name", ["name", "a/b/c", "/b", "hf://a/b", "a b/c", ""])
def test_a_name_of_another_form_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    with pytest.raises(InputError, match="must be ORG/NAME"):
        require_upload(name)


def test_without_a_token_it_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    require_upload(None)
    with pytest.raises(InputError, match="HF_TOKEN"):
        require_upload("org/name")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "secret")
    require_upload("org/name")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        require_upload("org/name")
