"""Single-edit typos in all packaged recipes: is each refused, and is the word that was meant suggested?

python scripts/typos.py                 # 500 typos by kind, as a table
python scripts/typos.py --processes 40  # besides, what 40 of them take as commands, and whether torch is imported
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mistyped import KINDS, Typo, typos

from rlpost.errors import RecipeError
from rlpost.recipe.files import packaged_folder
from rlpost.recipe.resolve import resolve


@dataclass(frozen=True)
class Outcome:
    """What became of a typo."""

    typo: Typo
    message: str | None
    """None: it was not refused."""

    @property
    def suggested(self) -> list[str]:
        """The words that the message asks about."""
        return re.findall(r"'([^']*)'", (self.message or "").partition("did you mean")[2])

    @property
    def right(self) -> bool:
        """Whether what was meant is among them."""
        return bool(set(map(_dotted, self.suggested)) & set(self.typo.meant))

    @property
    def placed(self) -> bool:
        """Whether the message says where the typo is."""
        return f"{self.typo.place}: " in _dotted(self.message or "")

    @property
    def unwanted(self) -> list[str]:
        """Suggestions that nobody may choose."""
        choices = self.typo.choices
        return [word for word in self.suggested if choices is not None and word not in choices]


def _dotted(text: str) -> str:
    return re.sub(r"\[(\d+)\]", r".\1", text)


def copy_recipes(folder: Path) -> None:
    """Lay a copy of the packaged recipes where typos can be written into them, beside those they inherit from."""
    shutil.copytree(packaged_folder(), folder, dirs_exist_ok=True)


def words(typo: Typo, folder: Path) -> list[str]:
    """The recipe and its overrides as the command line takes them; what is wrong in a file is written to `folder`."""
    if typo.text is None:
        return [typo.recipe, *typo.overrides]
    file = folder / f"{typo.recipe}_typo.yaml"
    file.write_text(typo.text, "utf-8")
    return [str(file), *typo.overrides]


def judge(typo: Typo, folder: Path) -> Outcome:
    """Resolve the recipe with its typo; `folder` is a copy of the packaged recipes."""
    recipe, *overrides = words(typo, folder)
    try:
        resolve(recipe, overrides)
    except RecipeError as error:
        return Outcome(typo, str(error))
    return Outcome(typo, None)


_TIMED = """
import atexit, sys
atexit.register(lambda: print("torch imported:", "torch" in sys.modules, file=sys.stderr))
from rlpost.__main__ import main
sys.argv[0] = "rlpost"
main()
"""


def run_command(typo: Typo, folder: Path) -> tuple[int, str, float, float]:
    """`rlpost train` as a process: exit code, stderr (its last line says whether torch was imported), seconds of time
    and of CPU time, of which the second is what the first would be on an idle machine.
    """
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", _TIMED, "train", *words(typo, folder)]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return ran.returncode, ran.stderr, time.perf_counter() - start, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=0, help="how many to run as commands")
    parser.add_argument("--show", action="store_true", help="print what was not suggested")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        copy_recipes(folder)
        os.chdir(folder)
        columns = ("typos", "refused", "placed", "right", "share", "lines", "unwanted")
        print(f"{'kind':<28}", *(f"{column:>8}" for column in columns))
        sample: list[Typo] = []
        outcomes: list[Outcome] = []
        for kind, count in KINDS.items():
            found = [judge(typo, folder) for typo in typos(kind, count, options.seed)]
            print(_row(kind, found), flush=True)
            outcomes += found
            sample += [o.typo for o in found[: -(-options.processes * count // sum(KINDS.values()))]]
        print(_row("all", outcomes))
        if options.show:
            for o in outcomes:
                if not o.right or not o.placed or o.unwanted:
                    print(f"  {o.typo.meant[-1]} -> {o.typo.typed} ({o.typo.recipe}): {o.message}")
        if options.processes:
            ran = [run_command(typo, folder) for typo in sample[: options.processes]]
            torch = sum("torch imported: True" in said for _, said, _, _ in ran)
            took, cpu = ([one[i] for one in ran] for i in (2, 3))
            print(
                f"{len(ran)} commands: median {statistics.median(took):.2f} s, slowest {max(took):.2f} s; of CPU time "
                f"{statistics.median(cpu):.2f} s and {max(cpu):.2f} s; exit code 2: {sum(one[0] == 2 for one in ran)}; "
                f"torch imported: {torch}"
            )


def _row(kind: str, outcomes: Sequence[Outcome]) -> str:
    count = len(outcomes)
    right = sum(o.right for o in outcomes)
    numbers = (
        count,
        sum(o.message is not None for o in outcomes),
        sum(o.placed for o in outcomes),
        right,
        f"{100 * right / count:.1f}%",
        max(len((o.message or "").splitlines()) for o in outcomes),
        sum(bool(o.unwanted) for o in outcomes),
    )
    return " ".join([f"{kind:<28}", *(f"{number:>8}" for number in numbers)])


if __name__ == "__main__":
    main()
