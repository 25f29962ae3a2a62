from __future__ import annotations

import tomllib
from pathlib import Path

from rlpost.cli.copy import schema_file

ROOT = Path(__file__).resolve().parents[2]


def test_the_wheel_holds_every_package_and_the_recipes() -> None:
    """The packages are listed by hand: a new folder must be added there."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in ROOT.glob("rlpost/**/*.py")}
    assert set(settings["packages"]) == folders | {"rlpost.recipes"}
    assert settings["package-dir"]["rlpost.recipes"] == "recipes"
    assert settings["package-data"]["rlpost.recipes"] == ["**/*.yaml", "**/*.jinja"]
    schema = schema_file().relative_to(ROOT / "rlpost").as_posix()
    assert settings["package-data"]["rlpost"] == ["py.typed", schema, "report/*.jinja", "kernels/*.c", "kernels/*.h"]
    assert {path.parent.name for kind in "ch" for path in ROOT.glob(f"rlpost/**/*.{kind}")} == {"kernels"}
    assert list(ROOT.glob("rlpost/**/*.jinja")) == list(ROOT.glob("rlpost/report/*.jinja")) != []
