"""What an editor says of a recipe: the YAML language server, which editors talk to, run without one.

    make editor                              # installs the server (needs npm) into .venv/node_modules
    python scripts/editor.py [RECIPE.yaml…]  # what it says of them; by default of all recipes that ship

The server is a program of node. It is asked as an editor asks it (LSP over its stdin and stdout): a text is opened,
diagnostics are published for it, completions are asked for at a position.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpost.recipe.files import GROUPS

ROOT = Path(__file__).parents[1]
PROGRAM = Path("node_modules/yaml-language-server/bin/yaml-language-server")
SECONDS = 60.0
"""How long an answer may take before the server counts as hanging."""


def installed() -> Path | None:
    """The server's program: below the folder that YAML_LANGUAGE_SERVER names, or below this Python's environment."""
    folders = [os.environ.get("YAML_LANGUAGE_SERVER"), sys.prefix]
    return next((Path(f, PROGRAM) for f in folders if f and shutil.which("node") and Path(f, PROGRAM).is_file()), None)


def shipped() -> list[Path]:
    """The recipes that come with rlpost."""
    return sorted((ROOT / "recipes").rglob("*.yaml"))


def opened(file: Path, schema: Path) -> str:
    """A file's text; that of a group's file says first that it is a section."""
    if file.parent.name not in GROUPS:
        return file.read_text("utf-8")
    return f"# yaml-language-server: $schema={schema}#/$defs/{file.parent.name.capitalize()}\n{file.read_text('utf-8')}"


@dataclass(frozen=True)
class Diagnostic:
    """A line of a text, counted from 1, and what is wrong there."""

    line: int
    message: str


class LanguageServer:
    """A running YAML language server; a context manager, which ends it.

    Args:
        program: the server's file (see `installed`).
        schema: the JSON Schema that texts are checked against; without one, what their own first line names.
    """

    def __init__(self, program: Path, schema: Path | None = None) -> None:
        self._process = subprocess.Popen(
            ["node", str(program), "--stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._settings = {
            "validate": True,
            "completion": True,
            "schemaStore": {"enable": False},
            "kubernetesCRDStore": {"enable": False},
            "schemas": {schema.absolute().as_uri(): "*.yaml"} if schema else {},
        }
        self._received: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._numbers = itertools.count(1)
        threading.Thread(target=self._read, daemon=True).start()
        self._ask("initialize", {"processId": os.getpid(), "rootUri": None, "capabilities": _CAPABILITIES})
        self._tell("initialized", {})
        self._tell("workspace/didChangeConfiguration", {"settings": {}})
        while self._receive().get("method") != "workspace/configuration":
            pass  # before it has its settings, it knows no schema

    def __enter__(self) -> LanguageServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def diagnostics(self, texts: Sequence[str]) -> list[list[Diagnostic]]:
        """What is wrong with YAML texts, by line; the server waits a little with each, so all at once are quicker."""
        found: dict[str, list[Diagnostic] | None] = dict.fromkeys([self._open(text) for text in texts])
        while None in found.values():
            message = self._receive()
            if message.get("method") == "textDocument/publishDiagnostics" and message["params"]["uri"] in found:
                of_text = message["params"]["diagnostics"]
                said = [Diagnostic(d["range"]["start"]["line"] + 1, d["message"]) for d in of_text]
                found[message["params"]["uri"]] = said
        return [said for said in found.values() if said is not None]

    def completions(self, text: str) -> dict[str, str]:
        """What may be typed at the end of a YAML text: each suggestion with its description."""
        lines = text.split("\n")
        place = {"line": len(lines) - 1, "character": len(lines[-1])}
        answer = self._ask("textDocument/completion", {"textDocument": {"uri": self._open(text)}, "position": place})
        items = answer["items"] if isinstance(answer, dict) else answer or []
        return {item["label"]: _plain(item.get("documentation", "")) for item in items}

    def _open(self, text: str) -> str:
        uri = f"file:///{next(self._numbers)}.yaml"
        document = {"uri": uri, "languageId": "yaml", "version": 1, "text": text}
        self._tell("textDocument/didOpen", {"textDocument": document})
        return uri

    def _ask(self, method: str, params: dict[str, Any]) -> Any:
        number = next(self._numbers)
        self._send({"id": number, "method": method, "params": params})
        while True:
            message = self._receive()
            if message.get("id") == number and "method" not in message:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]

    def _tell(self, method: str, params: dict[str, Any]) -> None:
        self._send({"method": method, "params": params})

    def _send(self, message: dict[str, Any]) -> None:
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        assert self._process.stdin
        self._process.stdin.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        self._process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        """The next message; the server's own questions are answered: what its settings are, else with nothing.

        Raises:
            TimeoutError: none came.
            EOFError: the server has ended.
        """
        try:
            message = self._received.get(timeout=SECONDS)
        except queue.Empty as error:
            raise TimeoutError(f"the YAML language server said nothing for {SECONDS:g} seconds") from error
        if message is None:
            raise EOFError("the YAML language server has ended")
        if "id" in message and "method" in message:
            asked = message["params"].get("items", []) if message["method"] == "workspace/configuration" else None
            self._send({"id": message["id"], "result": asked and [self._settings_of(item) for item in asked]})
        return message

    def _settings_of(self, item: dict[str, str]) -> dict[str, Any]:
        return self._settings if item["section"] == "yaml" else {}

    def _read(self) -> None:
        assert self._process.stdout
        while header := self._process.stdout.readline():
            if header.lower().startswith(b"content-length:"):
                self._process.stdout.readline()
                self._received.put(json.loads(self._process.stdout.read(int(header.split(b":")[1]))))
        self._received.put(None)


_CAPABILITIES: dict[str, Any] = {
    "textDocument": {
        "publishDiagnostics": {},
        "completion": {"completionItem": {"documentationFormat": ["markdown", "plaintext"]}},
    }
}


def _plain(documentation: str | dict[str, str]) -> str:
    return documentation if isinstance(documentation, str) else documentation["value"]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("recipes", nargs="*", type=Path, help="YAML files (all recipes that ship)")
    parser.add_argument("--schema", type=Path, default=ROOT / "rlpost/recipe/schema.json")
    options = parser.parse_args()
    program = installed()
    if program is None:
        sys.exit("no YAML language server: `make editor` installs it, which needs node and npm")
    wrong = 0
    with LanguageServer(program, options.schema.resolve()) as server:
        files = options.recipes or shipped()
        texts = [opened(file, options.schema.resolve()) for file in files]
        for file, found in zip(files, server.diagnostics(texts), strict=True):
            for diagnostic in found:
                print(f"{file}:{diagnostic.line - (file.parent.name in GROUPS)}: {diagnostic.message}")
                wrong += 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
