"""Runs the server of transformers or vLLM on a checkpoint: `rlpost serve`."""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from rlpost import console
from rlpost.errors import EngineError, RecipeError
from rlpost.inference.card import checkpoint_title
from rlpost.inference.checkpoint import located
from rlpost.inference.merge import write_merged
from rlpost.policy.adapter_files import is_adapter
from rlpost.policy.load import must_be_policy
from rlpost.policy.model_files import load_tokenizer, stored_dtype
from rlpost.policy.params import Model
from rlpost.run.files import disk_errors
from rlpost.run.interrupt import signals_raise

SERVERS = ("transformers", "vllm")
_NEEDED = ("fastapi", "uvicorn", "openai")
"""What transformers' server imports besides what rlpost needs: the extra `serve`."""
_GRACE = 10.0
"""Seconds in which a server that was asked to stop may finish its requests."""


def serve(checkpoint: str, server: str, host: str, port: int, options: Sequence[str] = ()) -> None:
    """Serve a model with OpenAI's interface until a signal ends it.

    An adapter is merged into its base first, in a temporary folder.

    Args:
        checkpoint: a run, a stage, a checkpoint, a model's folder, or its hub name.
        server: one of `SERVERS`.
        host: address to listen at.
        port: to listen at.
        options: further words of the server's command line.

    Raises:
        RecipeError: the server is not installed, or the port is taken.
        ModelError: the checkpoint is no policy, or cannot be loaded.
        EngineError: the server ended by itself.
        Interrupted: SIGTERM or SIGHUP.
    """
    start = _start_of(server)
    _must_be_free(host, port)
    model = located(checkpoint)
    with signals_raise(), TemporaryDirectory(prefix="rlpost-serve-") as made:
        name = _place(model, Path(made))
        has_template = load_tokenizer(str(Path(made) / name) if name != model else model, Model()).chat_template
        command = [*start, "serve", name, "--host", host, "--port", str(port), *options]
        console.say(f"$ {shlex.join(command)}")
        path = "chat/completions" if has_template else "completions (it has no chat template)"
        console.say(f"OpenAI's interface: http://{host}:{port}/v1, model {name}, {path}; Ctrl-C ends it")
        _run(command, Path(made))


def _start_of(server: str) -> list[str]:
    """The words that a server's command line starts with.

    Raises:
        RecipeError: it is not installed.
    """
    if server == "vllm":
        path = shutil.which("vllm")
        if path is None:
            raise RecipeError("--engine vllm: there is no program vllm on the PATH: pip install vllm")
        return [str(Path(path).absolute())]
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise RecipeError(f"--engine transformers: its server needs {', '.join(missing)}: pip install 'rlpost[serve]'")
    return [sys.executable, "-m", "transformers.cli.transformers"]


def _must_be_free(host: str, port: int) -> None:
    """Check that a server can listen there.

    Raises:
        RecipeError: another program does, the port is the system's, or the host is not this machine.
    """
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise RecipeError(f"--host {host}: no such host ({error}); name localhost, or 0.0.0.0 for all") from error
    listens = False
    for family, kind, protocol, _, address in addresses:
        try:
            with socket.socket(family, kind, protocol) as found:
                found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                found.bind(address)
                listens = True
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                taken = "in use" if error.errno == errno.EADDRINUSE else "not open to you"
                raise RecipeError(f"--port {port}: {taken} at {host}; name another") from error
    if not listens:
        raise RecipeError(f"--host {host}: not an address of this machine; name localhost, or 0.0.0.0 for all")


def _place(model: str, folder: Path) -> str:
    """Put the model into an empty folder, as a link or merged; returns its name there, or its name on the hub.

    The server runs there, so that clients need not name paths of this machine.
    """
    source = Path(model)
    if not source.is_dir():
        stored_dtype(model, None)  # fails in one line where a server would in many
        return model
    name = re.sub(r"[^\w.-]+", "-", checkpoint_title(source))
    with disk_errors(folder):
        if is_adapter(source):
            (folder / name).mkdir()
            write_merged(source, folder / name)
        else:
            must_be_policy(source)
            stored_dtype(model, None)
            (folder / name).symlink_to(source.resolve())
    return name


def _run(command: Sequence[str], folder: Path) -> None:
    """Run a server until it ends, or until an exception is raised here, such as a signal's; leaves no process.

    It has a process group of its own, so that Ctrl-C reaches it once, from here.
    """
    environment = {**os.environ, "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    try:
        process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True)
    except OSError as error:
        raise EngineError(f"{command[0]}: {error.strerror}; it cannot be run") from error
    try:
        code = process.wait()
    except BaseException:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
        raise
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if code:
        raise EngineError(f"{shlex.join(command[:3])}: ended with code {code}; its own lines above say why")
