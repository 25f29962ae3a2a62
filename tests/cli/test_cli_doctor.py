"""`rlpost doctor`: what is installed, what is missing, and the command that installs it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from rlpost.cli.app import main
from rlpost.inference import machine

SAID = [
    "numpy>=2.0",
    "pyyaml>=1000",
    "no-such-package>=1",
    "no-such-package>=1 ; extra == 'tracker'",
    'rich>=14; extra == "both"',
    'ruff>=1000; extra == "dev"',
]


def doctor(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["rlpost", "doctor", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_what_is_missing_or_too_old_is_said_with_its_remedy(monkeypatch, capsys) -> None:
    monkeypatch.setattr(metadata, "requires", lambda _name: SAID)
    assert doctor(monkeypatch) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[-2].startswith("problem: pyyaml: ")
    assert out[-2].endswith(" is installed, >=1000 is needed; pip install 'pyyaml>=1000'")
    assert out[-1] == "problem: no-such-package: not installed; pip install 'no-such-package>=1'"
    extras = [line.split() for line in out if line.startswith("[")]
    assert extras[0] == ["[both]", "rich", metadata.version("rich")]
    assert extras[1] == ["[tracker]", "not", "installed:", "pip", "install", "'rlpost[tracker]'"]


def test_json_has_the_same(monkeypatch, capsys) -> None:
    monkeypatch.setattr(metadata, "requires", lambda _name: SAID[:1] + SAID[3:])
    assert doctor(monkeypatch, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"] == [{"name": "numpy", "needs": ">=2.0", "found": metadata.version("numpy"), "ok": True}]
    assert {name: [p["ok"] for p in packages] for name, packages in found["extras"].items()} == {
        "both": [True],
        "tracker": [False],
    }
    assert found["problems"] == []
    assert found["threads"] >= 1
    assert found["precision"] in ("bfloat16", "float32")
    assert list(found["sandbox"]) == ["namespaces", "landlock", "rlimits"]


def test_levels_of_the_sandbox_are_said_with_what_they_lack(monkeypatch, capsys) -> None:
    monkeypatch.setattr(
        machine, "why_not", lambda level: "" if level == "landlock" else "unshare: not permitted (EPERM)"
    )
    assert doctor(monkeypatch) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sandbox ")]
    assert line.split(maxsplit=1)[1] == "namespaces: unshare: not permitted (EPERM); landlock: holds"


def test_without_an_installation_nothing_is_said_of_packages(monkeypatch) -> None:
    def absent(_name: str) -> list[str]:
        raise metadata.PackageNotFoundError("rlpost")

    monkeypatch.setattr(metadata, "requires", absent)
    assert machine.requirements() == ([], {})


def test_a_torch_that_does_not_load_is_a_problem_and_no_traceback(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = machine.examine()
    assert (found.threads, found.gpus, found.precision) == (None, [], None)
    assert any(line.startswith("torch cannot be imported: ") for line in found.problems)
    assert "unknown" in machine.text(found)


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  4000 kB\nMemAvailable:  3000 kB\n")
    monkeypatch.setattr(machine, "_MEMINFO", tmp_path / "meminfo")
    for limit, expected in (("max", (4_096_000, 3_072_000)), ("2048000", (2_048_000, 2_048_000))):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        monkeypatch.setattr(machine, "_CGROUP", (tmp_path / "memory.max",))
        assert machine.memory() == expected


def test_the_module_imports_no_torch() -> None:
    code = "import rlpost.inference.machine, sys; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
