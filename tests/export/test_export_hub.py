"""Pushing to the Hub: against a local server that speaks the part of its interface that is used."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml

import mlx_gemma4 as g4
from mlx_gemma4.errors import ExportError
from mlx_gemma4.export.hub import kind_of, model_card, push_folder, require_repo_id

TOKEN = "localTestOnly0123456789"  # of no form that could be recognised
REPO = "someone/my-gemma"


class Hub:
    """What the server holds, and how it misbehaves."""

    def __init__(self, address: str):
        self.address = address
        self.repos: dict[str, dict] = {}
        self.files: dict[str, bytes] = {}
        self.commits: list[dict[str, bytes]] = []
        self.cut_uploads = 0
        self.requests: list[str] = []


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *args):
        pass

    def answer(self, content, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self):
        self.hub.requests.append(f"GET {self.path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid credentials in Authorization header"}, 401)
        repo = self.hub.repos.get(self.path.removeprefix("/api/models/").split("?")[0])
        self.answer(repo or {"error": "Repository not found"}, 200 if repo else 404)

    def do_POST(self):
        body = self.body()
        self.hub.requests.append(f"POST {self.path}")
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid credentials in Authorization header"}, 401)
        if self.path == "/api/repos/create":
            return self.create(json.loads(body))
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return self.answer({"files": [self.mode(name) for name in names]})
        if self.path.endswith("/info/lfs/objects/batch"):
            upload = {"href": f"{self.hub.address}/upload/{{oid}}", "header": {}}
            objects = [
                file | {"actions": {"upload": upload | {"href": upload["href"].format(**file)}}}
                for file in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if "/commit/" in self.path:
            return self.commit([json.loads(line) for line in body.splitlines()])
        self.answer({"error": f"no {self.path}"}, 404)

    def do_PUT(self):
        if self.hub.cut_uploads:
            self.hub.cut_uploads -= 1
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        content = self.body()
        self.hub.files[self.path.removeprefix("/upload/")] = content
        self.answer({})

    def create(self, wanted: dict) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] != "someone":
            return self.answer({"error": f"you cannot create under {wanted['organization']}"}, 403)
        if name in self.hub.repos:
            return self.answer({"error": "exists", "url": f"{self.hub.address}/{name}"}, 409)
        private = wanted.get("private", wanted.get("visibility") == "private")
        self.hub.repos[name] = {"id": name, "private": private, "sha": "0" * 40}
        self.answer({"url": f"{self.hub.address}/{name}", "id": name, "name": wanted["name"]})

    @staticmethod
    def mode(name: str) -> dict:
        large = name.endswith((".safetensors", ".gguf"))
        return {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

    def commit(self, lines: list[dict]) -> None:
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.files[value["oid"]]
        self.hub.commits.append(files)
        self.answer({"commitUrl": f"{self.hub.address}/{REPO}/commit/1", "commitOid": "1" * 40})


@pytest.fixture
def hub(monkeypatch):
    """A server on this machine in the place of the Hub, and a token for it in the environment."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {}))
    server.RequestHandlerClass.hub = hub = Hub(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # Files go over HTTP: Xet's protocol is not spoken here.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # between tries
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tmp_path, gemma, rows):
    """The output folder of a short run."""
    data = g4.read(rows, gemma)
    g4.finetune(gemma, data, g4.TrainConfig(iters=1), output=tmp_path / "run", callbacks=[])
    return tmp_path / "run"


@pytest.fixture
def adapter(tmp_path):
    """The files of an adapter, in name."""
    folder = tmp_path / "secret-place" / "adapter"
    folder.mkdir(parents=True)
    (folder / "adapters.safetensors").write_bytes(bytes(range(256)) * 4000)
    config = {"model": "google/gemma-4-E2B-it", "lora_parameters": {"rank": 8}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("an older card")
    return folder


def snapshot(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_push_commits_every_file_and_a_card_at_once(hub, adapter):
    before = snapshot(adapter)
    url = push_folder(adapter, REPO)
    assert url.startswith(hub.address)
    assert hub.repos[REPO]["private"] is True
    (commit,) = hub.commits
    assert commit.keys() == before.keys()
    for name in before.keys() - {"README.md"}:
        assert commit[name] == before[name]
    assert b"google/gemma-4-E2B-it" in commit["README.md"]
    assert snapshot(adapter) == before


def test_push_again_and_push_in_public(hub, adapter):
    push_folder(adapter, REPO)
    push_folder(adapter, REPO)
    assert len(hub.commits) == 2
    push_folder(adapter, "someone/open", private=False)
    assert hub.repos["someone/open"]["private"] is False
    with pytest.raises(ExportError, match="exists and is public"):
        push_folder(adapter, "someone/open")
    assert len(hub.commits) == 3


def test_a_gguf_file_is_pushed_as_a_file(hub, tmp_path):
    file = tmp_path / "lora.gguf"
    file.write_bytes(b"GGUF" * 100)
    push_folder(file, REPO)
    (commit,) = hub.commits
    assert commit.keys() == {"README.md", "lora.gguf"}
    assert b"--lora lora.gguf" in commit["README.md"]


def test_an_upload_cut_in_the_middle_commits_nothing_and_can_be_repeated(hub, adapter):
    hub.cut_uploads = 1000
    with pytest.raises(ExportError) as error:
        push_folder(adapter, REPO)
    assert "cut" in str(error.value) and "push again" in str(error.value)
    assert not hub.commits and not hub.files
    hub.cut_uploads = 1  # huggingface_hub tries again by itself
    push_folder(adapter, REPO)
    content = (adapter / "adapters.safetensors").read_bytes()
    assert hub.commits[0]["adapters.safetensors"] == content
    assert hub.files.keys() == {hashlib.sha256(content).hexdigest()}


def test_a_refused_token_is_told_without_it(hub, adapter, monkeypatch, capfd, caplog):
    wrong = "hf_wrongButSecret987654"
    monkeypatch.setenv("HF_TOKEN", wrong)
    with pytest.raises(ExportError) as error:
        push_folder(adapter, REPO)
    assert "401" in str(error.value) and "hf auth login" in str(error.value)
    assert not hub.commits
    captured = capfd.readouterr()
    told = [str(error.value), repr(error.value), captured.out, captured.err, caplog.text]
    assert not any(wrong in text for text in told)


def test_a_token_in_an_answer_is_taken_out_of_the_error(hub, adapter, monkeypatch):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise RuntimeError(f"refused for {TOKEN} and hf_anotherOne123")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", fail)
    with pytest.raises(ExportError) as error:
        push_folder(adapter, REPO)
    assert TOKEN not in str(error.value) and "hf_another" not in str(error.value)
    assert "<token>" in str(error.value)
    assert error.value.__cause__ is None and error.value.__suppress_context__


def test_a_hub_that_is_not_there(hub, adapter, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ExportError, match="the upload was cut"):
        push_folder(adapter, REPO)


def test_no_token(hub, adapter, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(g4.ConfigError, match="no token"):
        push_folder(adapter, REPO)
    assert not hub.requests


@pytest.mark.parametrize("name", ["my-gemma", "a/b/c", "some one/x", "someone/--x", "someone/"])
def test_a_name_that_no_repository_can_have(hub, adapter, name):
    with pytest.raises(g4.ConfigError, match="no name of a repository"):
        push_folder(adapter, name)
    assert not hub.requests
    require_repo_id(REPO)


def test_a_name_that_the_hub_refuses(hub, adapter):
    with pytest.raises(ExportError) as error:
        push_folder(adapter, "google/gemma-5")
    assert "403" in str(error.value) and "write access" in str(error.value)
    assert not hub.commits


def test_a_folder_that_is_no_export(hub, tmp_path):
    with pytest.raises(g4.ConfigError, match="is no export"):
        push_folder(tmp_path, REPO)


def test_endpoint_and_token_come_from_the_environment(hub, adapter):
    """In a process of its own, as the command runs."""
    script = (
        "import sys; from mlx_gemma4.export.hub import push_folder\n"
        "print(push_folder(sys.argv[1], sys.argv[2]))"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0"}
    environment["HF_HUB_DISABLE_XET"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", script, str(adapter), REPO],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert hub.address in done.stdout and len(hub.commits) == 1
    assert TOKEN not in done.stdout + done.stderr


def test_the_card_tells_data_settings_and_losses_and_no_paths(run, tiny):
    card = model_card(run / "adapter", REPO, run)
    summary = json.loads((run / "summary.json").read_text())
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "mlx"
    assert "base_model" not in yaml.safe_load(head)  # a folder of this machine is no model's name
    for part in (tiny.name, "| source | rows |", "| steps | 1 |", "| lora_rank | 8 |"):
        assert part in body
    for loss in ("train_loss", "val_loss_before", "val_loss", "test_loss"):
        assert f"{summary[loss]:.4f}" in body
    assert str(run.parent) not in card and str(tiny.parent) not in card
    assert model_card(run / "adapter", REPO, run / "adapter") == card


@pytest.mark.parametrize(
    ("kind", "file", "config", "loads"),
    [
        ("mlx-lm", "adapters.safetensors", {"lora_parameters": {"rank": 8}}, "from mlx_lm"),
        ("mlx-vlm-legacy", "adapters.safetensors", {"rank": 8, "alpha": 16}, "from mlx_vlm"),
        (
            "peft",
            "adapter_model.safetensors",
            {"peft_type": "LORA", "r": 8},
            "PeftModel.from_pretrained",
        ),
        ("fused", "model.safetensors", {}, "ForConditionalGeneration.from_pretrained"),
    ],
)
def test_the_card_says_how_each_format_is_loaded(tmp_path, kind, file, config, loads):
    (tmp_path / file).touch()
    config = config | {"model": "google/gemma-4-E2B-it"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    card = model_card(tmp_path, REPO)
    assert kind_of(tmp_path) == kind
    assert loads in card and "google/gemma-4-E2B-it" in card and f'"{REPO}"' in card
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "google/gemma-4-E2B-it"
