"""Whether every name that docs/peers.yaml gives a peer stands in that peer's package.

    pip download --no-deps --dest FOLDER trl==1.16.0 trl==1.12.0 verl==0.9.1 openrlhf==0.11.2
    python scripts/peers.py FOLDER

Names are read from the packages' source, which is not imported: fields of TRL's configs, keys of verl's Hydra configs
(written out in one file), flags of OpenRLHF. Prints those that are not there, and exits with 1 if there are any.
"""

from __future__ import annotations

import argparse
import ast
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

TABLE = Path(__file__).parents[1] / "docs" / "peers.yaml"
PEERS = ("trl", "verl", "openrlhf")


def names_in(cell: str | list[str] | None) -> list[str]:
    """The names in a cell of the table: none, one or several."""
    return [] if cell is None else [cell] if isinstance(cell, str) else cell


def fields(source: str) -> Iterator[str]:
    """Names that classes annotate: the fields of dataclasses."""
    for node in ast.walk(ast.parse(source)):
        for line in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                yield line.target.id


def flags(source: str) -> Iterator[str]:
    """Flags of a command line; those of the optimiser stand in a function with a prefix, for actor and critic."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            name = ast.unparse(node.args[0]).lstrip("f").strip("'\"")
            yield from (name.replace("{prefix}", prefix) for prefix in ("actor", "critic"))


def keys(tree: Any, above: str = "") -> Iterator[str]:
    """Dotted keys of a mapping, sections too."""
    for key, value in tree.items() if isinstance(tree, dict) else ():
        yield f"{above}{key}"
        yield from keys(value, f"{above}{key}.")


def offered(packages: Path) -> dict[str, set[str]]:
    """The names of each peer, from the wheels in a folder and the transformers of this environment."""
    import transformers

    found: dict[str, set[str]] = {peer: set() for peer in PEERS}
    found["trl"] |= set(transformers.TrainingArguments.__dataclass_fields__)
    for wheel in sorted(packages.glob("*.whl")):
        peer = wheel.name.partition("-")[0]
        with zipfile.ZipFile(wheel) as files:
            for name in files.namelist():
                text = files.read(name).decode("utf-8") if name.endswith((".py", ".yaml")) else ""
                if peer == "trl" and name.endswith(("_config.py", "scripts/utils.py")):
                    found[peer] |= set(fields(text))
                elif peer == "openrlhf" and "/cli/" in name:
                    found[peer] |= set(flags(text))
                elif peer == "verl" and name.endswith(("_generated_ppo_trainer.yaml", "sft_trainer_engine.yaml")):
                    found[peer] |= set(keys(yaml.safe_load(text)))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("packages", type=Path, help="the folder with the peers' wheels")
    options = parser.parse_args()
    table, names = yaml.safe_load(TABLE.read_text("utf-8")), offered(options.packages)
    wrong = 0
    for group in ("sections", "arguments"):
        for section, rows in table[group].items():
            for key, cells in rows.items():
                for peer, cell in zip(PEERS, cells, strict=True):
                    for name in names_in(cell):
                        if name not in names[peer]:
                            print(f"{section}.{key}: {peer} has no {name}")
                            wrong += 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
