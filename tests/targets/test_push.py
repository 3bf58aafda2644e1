"""`push` against a hub of our own on this machine: what is uploaded, and what never is."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

import transmla
from transmla.errors import DestinationError, SourceError, UnsupportedError
from transmla.targets.push import files_of, paths_in, without_paths

# the client library's own, of how it uploads
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=")


class Hub(HTTPServer):
    """Takes one repository. files: as they were committed;  asked: what was sent to create it"""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.stored: dict[str, bytes] = {}
        self.asked: dict[str, Any] = {}
        self.refuses = False
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, content: Any, status: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        found = {"id": "me/model", "name": "me", "xetEnabled": False}
        self.answer({"error": "not allowed"}, 403) if self.server.refuses else self.answer(found)

    def do_PUT(self) -> None:
        self.server.stored[self.path.rpartition("/")[2]] = self.body()
        self.answer({})

    def do_POST(self) -> None:
        sent = self.body()
        if self.server.refuses:
            self.answer({"error": "not allowed"}, 403)
        elif self.path == "/api/repos/create":
            self.server.asked = json.loads(sent)
            self.answer({"url": f"{self.server.address}/me/model", "name": "me/model"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith("safetensors") else "regular",
                 "shouldIgnore": False}
                for one in json.loads(sent)["files"]
            ]  # fmt: skip
            self.answer({"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                one | {"actions": {"upload": {"href": f"{self.server.address}/put/{one['oid']}"}}}
                for one in json.loads(sent)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            for line in map(json.loads, sent.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    self.server.files[line["value"]["path"]] = self.server.stored[line["value"]["oid"]]
            url = f"{self.server.address}/me/model/commit/1"
            self.answer({"success": True, "commitOid": "1", "commitUrl": url, "hookOutput": ""})
        else:
            self.answer({"error": self.path}, 404)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in ("HF_HUB_OFFLINE", "is_offline_mode"):
        if hasattr(huggingface_hub.constants, name):
            value: Any = False if name == "HF_HUB_OFFLINE" else lambda: False
            monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    made = Hub()
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a conversion of a local source leaves, and what somebody put beside it."""
    made = tmp_path / "out"
    made.mkdir()
    home = str(tmp_path / "private" / "llama")
    provenance = {"format": 1, "source": {"name": home}, "recipe": {"calibration": f"{home}/a.txt:2+wikitext"}}
    (made / "transmla.json").write_text(json.dumps(provenance))
    (made / "README.md").write_text(
        f"---\nbase_model: me/base\n---\nConverted from {home}, see https://arxiv.org/abs/1\n"
    )
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(b"weights")
    (made / "notes.txt").write_text("mine")
    (made / ".env").write_text("HF_TOKEN=1")
    return made


def test_templates_beside_the_default_one(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a folder in the home of the user."""
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("tools")
    monkeypatch.setenv("HOME", str(tmp_path))
    transmla.push("~/out", "me/model", endpoint=hub.address)
    assert hub.files["additional_chat_templates/tools.jinja"] == b"tools" and "config.json" in hub.files


def test_what_is_uploaded(hub: Hub, folder: Path) -> None:
    url = transmla.push(folder, "me/model", private=True, endpoint=hub.address)
    assert url == f"{hub.address}/me/model/commit/1"
    assert hub.asked["name"] == "model" and hub.asked.get("private", hub.asked.get("visibility")) in (True, "private")
    assert set(hub.files) == {"transmla.json", "README.md", "config.json", "model.safetensors"}
    assert hub.files["model.safetensors"] == b"weights"
    provenance = json.loads(hub.files["transmla.json"])
    assert provenance["source"]["name"] == "llama" and provenance["recipe"]["calibration"] == "a.txt:2+wikitext"
    card = hub.files["README.md"].decode()
    assert "Converted from llama, see https://arxiv.org/abs/1" in card and "base_model: me/base" in card
    assert not any(str(folder.parent).encode() in content for content in hub.files.values())
    assert str(folder.parent) in (folder / "README.md").read_text(), "the folder itself stays as it is"


def test_refusals(hub: Hub, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        transmla.push(tmp_path, "me/model", endpoint=hub.address)
    with pytest.raises(DestinationError, match="owner/name"):
        transmla.push(folder, "me/mo/del", endpoint=hub.address)
    hub.refuses = True
    with pytest.raises(DestinationError, match="hf auth login"):
        transmla.push(folder, "me/model", endpoint=hub.address)
    hub.refuses = False
    (folder / "README.md").write_text("my token is hf_" + "a" * 34)
    with pytest.raises(UnsupportedError, match="access token"):
        transmla.push(folder, "me/model", endpoint=hub.address)
    assert not hub.files


def test_nobody_is_there(folder: Path, hub: Hub, free_port: int) -> None:
    with pytest.raises(DestinationError, match="connection"):
        transmla.push(folder, "me/model", endpoint=f"http://127.0.0.1:{free_port}")


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("/home/me/models/llama", "llama"),
        ("~/models/llama:3+wikitext", "llama:3+wikitext"),
        ("../a/b.txt and ./c/d", "b.txt and d"),
        ("owner/name", "owner/name"),
        ("https://host/a/b/c", "https://host/a/b/c"),
        ("1/2 or a / b", "1/2 or a / b"),
    ],
)
def test_paths_become_names(text: str, cleaned: str) -> None:
    assert without_paths(text) == cleaned


def test_paths_with_spaces_become_names() -> None:
    values = {"source": {"name": "~/jane doe/a (old)/secret project/Qwen"}, "mix": ["wikitext+~/my data/x y.txt:2"]}
    text = json.dumps(values) + "converted from ~/jane doe/a (old)/secret project/Qwen with ~/my data/x y.txt:2"
    found = without_paths(text, paths_in(values))
    assert json.loads(found.partition("converted")[0]) == {"source": {"name": "Qwen"}, "mix": ["wikitext+x y.txt:2"]}
    assert found.endswith("converted from Qwen with x y.txt:2")


def test_a_licence_in_another_encoding(folder: Path) -> None:
    (folder / "LICENSE").write_bytes("Copyright Jos\xe9".encode("latin-1"))
    assert folder / "LICENSE" in files_of(folder)
    (folder / "LICENSE").write_bytes("Jos\xe9 ".encode("latin-1") + b"hf_" + b"x" * 30)
    with pytest.raises(UnsupportedError, match="token"):
        files_of(folder)
