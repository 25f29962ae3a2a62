"""A checkpoint on the hub: what arrives at a stand-in, and what its refusals say."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import yaml
from tiny_recipes import LORA, MODEL, SFT, greedy, policy, run, sha256, weights
from transformers import AutoModelForCausalLM

from rlpost.errors import DiskError, ModelError, RecipeError
from rlpost.inference.merge import merge_checkpoint
from rlpost.inference.push import push
from rlpost.inference.sample import sample
from rlpost.recipe.sampling import sampling_from
from rlpost.stage_rows import positions_of

TOKEN = "hf_thisIsASecret"
COMMIT = "0123456789" * 4


class Hub(ThreadingHTTPServer):
    """What the hub answers to an upload; weights go through LFS, as there."""

    def __init__(self) -> None:
        super().__init__(("localhost", 0), Answers)
        self.repos: dict[str, bool] = {}
        """Name -> whether it is private."""
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.refuse: dict[str, tuple[int, str]] = {}
        """The end of a path -> the status and message that it is refused with."""
        self.heard: list[str] = []

    @property
    def address(self) -> str:
        return f"http://localhost:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, found: Any, status: int = 200, **headers: str) -> None:
        body = json.dumps(found).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def heard(self) -> bytes | None:
        """The body of a request that is not refused."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.heard.append(f"{self.command} {self.path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and self.command != "PUT":
            self.answer({"error": "Invalid username or password."}, 401)
            return None
        for end, (status, message) in self.server.refuse.items():
            if self.path.endswith(end):
                self.answer({"error": message}, status, X_Error_Message=message)
                return None
        return body

    def do_HEAD(self) -> None:
        """No model of others is here."""
        self.answer({}, 404, X_Error_Code="EntryNotFound")

    def do_GET(self) -> None:
        if self.heard() is None:
            return
        if self.path == "/api/whoami-v2":
            self.answer({"name": "ada", "type": "user"})
        else:
            name = self.path.removeprefix("/api/models/").partition("?")[0]
            if name not in self.server.repos:
                self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
                return
            self.answer({"id": name, "private": self.server.repos[name], "tags": [], "siblings": []})

    def do_PUT(self) -> None:
        self.server.objects[self.path.rpartition("/")[2]] = self.heard() or b""
        self.answer({})

    def do_POST(self) -> None:
        body = self.heard()
        if body is None:
            return
        hub = self.server
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization'] or 'ada'}/{asked['name']}"
            there = name in hub.repos
            hub.repos.setdefault(name, asked.get("visibility") == "private")
            self.answer({"url": f"{hub.address}/{name}"}, 409 if there else 200)
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
            self.answer({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for each in objects:
                each["actions"] = {"upload": {"href": f"{hub.address}/put/{each['oid']}"}}
            self.answer({"transfer": "basic", "objects": objects})
        else:
            assert self.path.endswith("/commit/main"), self.path
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.objects[value["oid"]]
            name = self.path.removeprefix("/api/models/").removesuffix("/commit/main")
            self.answer({"commitUrl": f"{hub.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT})


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    with Hub() as found:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", found.address)
        template = f"{found.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        thread = threading.Thread(target=found.serve_forever, args=(0.01,))
        thread.start()
        yield found
        found.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run with an adapter."""
    made = tmp_path_factory.mktemp("push")
    run(made, {"sft": {**SFT, "steps": 2}}, LORA)
    return made / "runs/run"


def put(hub: Hub, folder: Path) -> Path:
    """What arrived, as a folder."""
    folder.mkdir()
    for name, content in hub.files.items():
        (folder / name).write_bytes(content)
    return folder


def state(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_merged_checkpoint_arrives_with_its_card(hub, trained, tmp_path, capsys):
    before = state(trained)
    assert push(str(trained), "sums", merged=True, private=True) == f"{hub.address}/ada/sums"
    assert hub.repos == {"ada/sums": True}
    there = put(hub, tmp_path / "there")
    needed = {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert needed <= set(hub.files)
    assert not {"checkpoint.json", "MANIFEST.json"} & set(hub.files)
    AutoModelForCausalLM.from_pretrained(there)
    card = hub.files["README.md"].decode()
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "transformers"
    assert "# sums\n" in card
    assert 'from_pretrained("ada/sums"' in card
    assert "| sft | sft | 2 | " in card
    assert str(trained.parent.parent) not in card
    assert state(trained) == before
    told = capsys.readouterr()
    assert TOKEN not in told.out + told.err


@pytest.fixture
def on_hub(tmp_path, monkeypatch, trained) -> str:
    """The name of a model on the hub, of which this machine has one commit, which is on no branch."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    repository = cache / "models--somebody--tiny"
    shutil.copytree(trained / "base", repository / "snapshots" / COMMIT)
    (repository / "snapshots" / COMMIT / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return "somebody/tiny"


def test_an_adapter_stays_one_and_names_its_base_and_revision(hub, on_hub, tmp_path, monkeypatch):
    model = {"path": on_hub, "revision": COMMIT, "precision": "float32"}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    final = run(tmp_path, {"sft": {**SFT, "steps": 2}}, LORA, model=model)
    (answer,) = sample(str(final), "12+34=", sampling=sampling_from(greedy=True, max_new_tokens=5))
    assert [answer] == greedy(policy(final), "12+34=")
    assert positions_of(final, None) == MODEL["config"]["max_position_embeddings"]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    push(str(tmp_path / "runs/run"), "ada/sums")
    assert hub.repos == {"ada/sums": False}
    assert "model.safetensors" not in hub.files
    there = put(hub, tmp_path / "there")
    config = json.loads(hub.files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == (on_hub, COMMIT)
    assert weights(there).keys() == weights(final).keys()
    card = hub.files["README.md"].decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "peft"
    assert front["base_model"] == on_hub
    assert front["license"] == "apache-2.0"
    assert 'AutoPeftModelForCausalLM.from_pretrained("ada/sums"' in card


def test_a_folder_is_uploaded_as_it_is_and_again(hub, trained, tmp_path):
    merge_checkpoint(str(trained), str(tmp_path / "model"))
    (tmp_path / "model/notes.txt").write_text("mine", "utf-8")
    (tmp_path / "model/.secret").write_text("mine", "utf-8")
    card = (tmp_path / "model/README.md").read_text("utf-8")
    for _ in range(2):
        assert push(str(tmp_path / "model"), "lab/sums") == f"{hub.address}/lab/sums"
    assert hub.files["notes.txt"] == b"mine"
    assert ".secret" not in hub.files
    assert hub.files["README.md"].decode() == card.replace("REPO_OR_FOLDER", "lab/sums")
    assert hub.files["model.safetensors"] == (tmp_path / "model/model.safetensors").read_bytes()
    hub.heard.clear()
    with pytest.raises(DiskError, match="it exists and is public, so nothing was uploaded"):
        push(str(tmp_path / "model"), "lab/sums", private=True)
    assert not any("commit" in line for line in hub.heard)


def test_refusals_are_one_line_and_tell_no_token(hub, trained, monkeypatch):
    folder = str(trained / "base")

    def refused(error: type[Exception], repo: str = "ada/sums", what: str = folder) -> str:
        with pytest.raises(error) as caught:
            push(what, repo)
        told = str(caught.value)
        assert "\n" not in told
        assert TOKEN not in told
        return told

    assert "write owner/name" in refused(RecipeError, "a/b/c")
    assert "push it with --merged" in refused(ModelError, what=str(trained))
    assert "no such folder" in refused(ModelError, what=str(trained / "none"))
    assert not hub.heard
    hub.refuse = {"/repos/create": (403, "You don't have the rights to create a model under this namespace")}
    told = refused(DiskError, "other/sums")
    assert told.startswith("other/sums: the hub refuses (403: ")
    assert "your token needs write access there" in told
    hub.refuse = {"/commit/main": (500, "Something broke")}
    assert "try again later" in refused(DiskError)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    told = refused(DiskError)
    assert "Invalid user token" in told
    assert "hf auth login" in told
    assert "hf_other" not in told
    monkeypatch.delenv("HF_TOKEN")
    assert refused(DiskError) == "ada/sums: not logged in to the hub; `hf auth login`, or set HF_TOKEN"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.refuse = {}
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://localhost:1")
    assert "check the connection" in refused(DiskError)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(DiskError)
    assert hub.files == {}


@pytest.mark.slow
def test_the_command_prints_the_address_alone(hub, trained):
    words = [sys.executable, "-m", "rlpost", "push", str(trained / "base"), "ada/sums"]
    settings = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **settings})
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{hub.address}/ada/sums\n"
    assert TOKEN not in done.stderr
    assert "config.json" in hub.files
