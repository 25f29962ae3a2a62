"""A checkpoint behind OpenAI's interface: the same answers as `rlpost sample`, and no process is left."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tiny_recipes import LORA, MODEL, SFT, run

from rlpost.errors import EngineError, Interrupted, ModelError, RecipeError
from rlpost.inference.sample import sample
from rlpost.inference.serve import serve
from rlpost.recipe.sampling import sampling_from

TEMPLATE = (
    "{% for m in messages %}{{ '1' if m.role == 'user' else '2' }}{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}2{% endif %}"
)
STAND_IN = f"""#!{sys.executable}
import fcntl, json, os, pathlib, signal, sys, time
heard = pathlib.Path(__file__).with_name("heard.json")
lock = heard.with_name("lock").open("w")
fcntl.flock(lock, fcntl.LOCK_SH)
if os.fork():
    signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
    told = dict(words=sys.argv[1:], folder=os.getcwd(), files=os.listdir(sys.argv[2]))
    heard.with_suffix(".tmp").write_text(json.dumps(told))
    heard.with_suffix(".tmp").rename(heard)
    if "--fail" in sys.argv:
        sys.exit(3)
else:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
time.sleep(100)
"""
"""A program and a worker of its own, which hears no Ctrl-C."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return int(s.getsockname()[1])


def wait_for(found: Callable[[], Any], alive: Callable[[], bool]) -> Any:
    for _ in range(1500):
        if it := found():
            return it
        assert alive()
        time.sleep(0.1)
    raise AssertionError("it did not happen in time")


def must_be_over(vllm: Path) -> None:
    """No process of the stand-in is left: each holds a lock while it lives."""
    with vllm.with_name("lock").open() as file:
        for _ in range(100):
            with suppress(BlockingIOError):
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            time.sleep(0.05)  # the kernel ends them a moment after the signal
    raise AssertionError("a process goes on")


def train(folder: Path, *overrides: str) -> Path:
    """A run of one stage; its model has a chat template."""
    (folder / "turns.jinja").write_text(TEMPLATE, "utf-8")
    model = {**MODEL, "chat_template": str(folder / "turns.jinja")}
    run(folder, {"sft": {**SFT, "steps": 2}}, *overrides, model=model)
    return folder / "runs/run"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run with an adapter; its `base` is a whole model without a chat template."""
    return train(tmp_path_factory.mktemp("serve"), LORA)


@pytest.fixture
def vllm(tmp_path, monkeypatch) -> Path:
    """A program `vllm` on the PATH; what it hears will be in this file."""
    program = tmp_path / "vllm"
    program.write_text(STAND_IN, "utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return tmp_path / "heard.json"


def test_vllm_gets_the_adapter_merged_and_a_name_that_tells_no_path(trained, vllm):
    port = free_port()
    with pytest.raises(EngineError, match="ended with code 3"):
        serve(str(trained), "vllm", "localhost", port, ["--fail"])
    heard = json.loads(vllm.read_text("utf-8"))
    assert heard["words"] == ["serve", "run-sft", "--host", "localhost", "--port", str(port), "--fail"]
    assert {"model.safetensors", "generation_config.json", "chat_template.jinja"} <= set(heard["files"])
    assert not Path(heard["folder"]).exists()
    must_be_over(vllm)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Interrupted)])
def test_a_signal_ends_the_server_and_all_its_processes(trained, vllm, capsys, number, error):
    ended = threading.Event()

    def send() -> None:
        wait_for(vllm.exists, lambda: not ended.is_set())
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        with pytest.raises(error):
            serve(str(trained / "base"), "vllm", "localhost", free_port())
    finally:
        ended.set()
        sender.join()
    heard = json.loads(vllm.read_text("utf-8"))
    assert heard["words"][1] == "base"
    assert "/v1, model base, completions (it has no chat template)" in capsys.readouterr().err
    assert not Path(heard["folder"]).exists()
    must_be_over(vllm)
    assert (trained / "base/config.json").is_file()


def test_what_cannot_be_served_is_one_line(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("rlpost.inference.serve.find_spec", lambda name: None if name == "uvicorn" else True)
    with pytest.raises(RecipeError, match=r"needs uvicorn: pip install 'rlpost\[serve\]'"):
        serve(str(trained), "transformers", "localhost", free_port())
    monkeypatch.setattr("rlpost.inference.serve.find_spec", lambda name: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RecipeError, match="pip install vllm"):
        serve(str(trained), "vllm", "localhost", free_port())
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RecipeError, match=f"--port {port}: in use at localhost; name another"):
            serve(str(trained), "transformers", "localhost", port)
    with pytest.raises(RecipeError, match="--host"):
        serve(str(trained), "transformers", "192.0.2.1", free_port())
    with pytest.raises(ModelError, match="no such folder"):
        serve(str(tmp_path / "none"), "transformers", "localhost", free_port())
    scores = tmp_path / "scores"
    scores.mkdir()
    for name in ("config.json", "scalar_head.safetensors"):
        (scores / name).write_bytes(b"{}")
    with pytest.raises(ModelError, match="a model that scores"):
        serve(str(scores), "transformers", "localhost", free_port())


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        found: dict[str, Any] = json.load(reply)
    return found


def listens(port: int) -> bool:
    try:
        with socket.create_connection(("localhost", port), timeout=1):
            return True
    except OSError:
        return False


@pytest.mark.extras
@pytest.mark.parametrize("overrides", [[LORA], ["stages.sft.learning_rate=1e-4"]], ids=["adapter", "whole"])
def test_transformers_answers_as_sample_does(tmp_path, overrides):
    trained = str(train(tmp_path, *overrides))
    there = {path.name for path in tmp_path.iterdir()}
    port = free_port()
    words = [sys.executable, "-m", "rlpost", "serve", trained, "--port", str(port)]
    with (tmp_path / "told").open("w") as told:
        server = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=told, env={**os.environ, "TMPDIR": str(tmp_path)}
        )
    try:
        greedy = sampling_from(greedy=True, max_new_tokens=5)
        wait_for(lambda: listens(port), lambda: server.poll() is None)
        texts = set()
        for question in ("12+34", "5", "7+8=", "0", "99+9"):
            asked = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 5}
            answer = post(f"http://localhost:{port}/v1/chat/completions", asked)
            text = answer["choices"][0]["message"]["content"] or ""
            (ours,) = sample(trained, question, sampling=greedy)
            assert text == ours.replace("<pad>", ""), "but for special tokens, which that server never shows"
            texts.add(text)
            assert answer["model"].startswith("run-sft")
        assert len(texts) > 1
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 130
    finally:
        server.kill()
        assert server.communicate()[0] == b""
    assert not listens(port)
    assert {path.name for path in tmp_path.iterdir()} == {*there, "told"}, "the temporary folder is gone"
    assert "Traceback" not in (tmp_path / "told").read_text("utf-8")
