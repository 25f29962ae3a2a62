"""What programs tried in the sandbox, by kind, and how many got out: the table of docs/sandbox.md.

    python scripts/sandbox_escapes.py

The attempts are those of the tests: `tests/sandbox/attempts.py`, each a program of its own here, and the programs of
`tests/rewards/test_code.py` that want to pass without being right. Without a sandbox only those are made that do no
harm there, and tests run beside the program that should pass them. Exit code 1 if one got out of a sandbox.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "tests" / name) for name in ("sandbox", "rewards")]

import attempts  # noqa: E402
import test_code  # noqa: E402

from rlpost.rewards.code import code  # noqa: E402
from rlpost.sandbox.outcome import Level, Limits  # noqa: E402
from rlpost.sandbox.run import run  # noqa: E402
from rlpost.types import Completion  # noqa: E402

LIMITS = Limits(seconds=60, cpu_seconds=20, disk=8)
LEVELS = (Level.namespaces, Level.landlock, Level.rlimits)


CALLS = "system calls by number"
SEEMING = "seeming right without being so"


def main() -> int:
    found = {level: dict(escaped(level)) for level in LEVELS}
    print("| kind | attempts | out of `namespaces` | out of `landlock` | without a sandbox |")
    print("|---|---|---|---|---|")
    for kind, count in counts().items():
        strong, weak, (out, tried) = (found[level][kind] for level in LEVELS)
        print(f"| {kind} | {count} | {strong[0]} | {weak[0]} | {out} of {tried} |")
    held = sum(out for level in LEVELS[:2] for out, _ in found[level].values())
    print(f"{sum(counts().values())} attempts at each level, {held} out of a sandbox", file=sys.stderr)
    return int(held > 0)


def counts() -> dict[str, int]:
    """Kind -> how many attempts there are."""
    bodies = {kind: len(bodies) for kind, bodies in attempts.KINDS.items()}
    return {**bodies, CALLS: len(attempts.SYSTEM_CALLS), SEEMING: len(test_code.FAKES)}


def escaped(level: Level) -> Iterator[tuple[str, tuple[int, int]]]:
    """Kind -> (attempts that got out, attempts that were made) at a level."""
    for kind, bodies in attempts.KINDS.items():
        names = [name for name in bodies if level is not Level.rlimits or name in attempts.NAKED]
        yield kind, (sum(gets_out(name, level) for name in names), len(names))
    answered = json.loads(run(attempts.raw(), limits=LIMITS, level=level).stdout)
    yield CALLS, (len(answered), len(attempts.SYSTEM_CALLS))
    if level is Level.rlimits:  # held all the same, but its tests run beside it and its exit code is the verdict
        asserted = "\n".join(test_code.AREA["tests"])
        beside = [f"{program}\n{asserted}\n" for program in test_code.FAKES.values()]
        yield SEEMING, (sum(run(each, level=Level.landlock).succeeded for each in beside), len(beside))
    else:
        completions = [Completion((), (), program) for program in test_code.FAKES.values()]
        shares = code(completions, [test_code.AREA] * len(completions), partial=False, level=level)
        yield SEEMING, (sum(share == 1 for share in shares), len(shares))


def gets_out(name: str, level: Level) -> bool:
    with tempfile.TemporaryDirectory(prefix="attempts-") as folder, attempts.outside(Path(folder)) as given:
        outcome = run(attempts.together(frozenset({name})), stdin=json.dumps(given), limits=LIMITS, level=level)
        Path(f"/dev/shm/{Path(folder).name}").unlink(missing_ok=True)  # where "write to shared memory" does
    return bool(json.loads(outcome.stdout))


if __name__ == "__main__":
    sys.exit(main())
