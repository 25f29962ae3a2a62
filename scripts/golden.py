"""Golden runs: every stage kind on a tiny model, compared with what it gave when its reference was written.

    python scripts/golden.py [--only NAME ...] [--way full] [--exact]     compare; exits 1 on any difference
    python scripts/golden.py --ranks 2 [--strategy fsdp2]                 each run as so many processes
    python scripts/golden.py --write [--only NAME ...]                    write the references that are missing

tests/golden/runs.yaml holds the recipes. Each is run by the command line (`rlpost train`, and what its `commands` say)
in a process of its own, full and with LoRA, and what it leaves is read from its folder: metrics, rollouts with their
ids and log-probabilities, rows, evaluations, and for every weight file a few statistics of all its numbers.

Everything but numbers with a fraction must be equal: ids, texts, counts, names. Such numbers may differ by TOLERANCE
of the reference's size plus ABSOLUTE; with --exact, not at all. What a run leaves beyond its reference is a difference
too, but for further keys of a rollout. Passes cut in another way stay within that, but where the number is nothing but
rounding: the level of a reward model's head, and the accuracy of a pair loss while policy and reference are the same.

Runs use PyTorch's own kernels (PLAIN): faster ones add in another order, which AdamW makes visible where a gradient is
next to nothing. They are held to PyTorch's own by their tests and at load.

A reference is replaced only with --reason, and only of runs whose `marks` say that they sample episodes of several
turns or go on from inside a completion: there the engine may come to the same tokens by another order of sums. The
reason is kept in the reference.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import multiprocessing
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
REFERENCES = GOLDEN / "references"
TOLERANCE = 1e-5
ABSOLUTE = 1e-6
OF_RANKS = (1e-3, 1e-2)
"""Tolerance and absolute tolerance of several processes: AdamW makes full steps of what is left of a gradient that is
0, which is rounding, and another where an update is cut in another way. invariance.py shows how exact gradients are."""
PLAIN = ("model.fast=false", "rollouts.fused=false")
"""Overrides of every run."""
LORA = "model.lora={r: 4, alpha: 8}"
ROUNDING = ("accuracy", "score")
"""The accuracy of a pair loss while policy and reference are the same, and the level of a reward model's head."""
DIGITS = 9
"""Significant digits of a log-probability: as many as tell every float32 from the next."""
HEAVY = (
    *("torch", "accelerate", "datasets", "hydra", "peft", "pydantic", "typer"),
    *("transformers.models.llama.modeling_llama", "transformers.models.gpt2.modeling_gpt2"),
    *("rlpost.cli", "rlpost.data.tasks", "rlpost.pipeline"),
)
"""Imported once, before each run gets a process of its own."""
RANK = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
LONGEST = 120.0
"""Seconds; a run that takes longer has failed."""


@dataclass(frozen=True)
class Run:
    """A recipe in one of its ways."""

    name: str
    way: str
    recipe: Mapping[str, Any]
    overrides: Sequence[str] = ()
    before: Sequence[str] | None = None
    commands: Sequence[Sequence[str]] = ()
    marks: Sequence[str] = ()

    @property
    def key(self) -> str:
        """The name of its reference."""
        return self.name if self.way == "full" else f"{self.name}-{self.way}"

    @property
    def kinds(self) -> str:
        """The kinds of its stages, each once."""
        kinds = dict.fromkeys(stage["kind"] for stage in self.recipe["stages"].values())
        return "+".join([*kinds, *(["eval"] if "evaluation" in self.recipe else [])])

    @property
    def file(self) -> Path:
        """Its reference."""
        return REFERENCES / f"{self.key}.json"


@dataclass
class Difference:
    """How two results differ."""

    others: list[str] = field(default_factory=list)
    """Places where something else than a number with a fraction differs, with what stands there."""
    worst: float = 0.0
    """The largest difference of two numbers, as a share of what is allowed."""
    largest: float = 0.0
    """The largest difference of two numbers."""
    where: str = ""
    """Of the worst one."""


def listed() -> list[Run]:
    """All runs of tests/golden/runs.yaml."""
    runs = []
    for name, said in yaml.safe_load((GOLDEN / "runs.yaml").read_text("utf-8"))["runs"].items():
        ways = {"both": ("full", "lora")}.get(said["ways"], (said["ways"],))
        for way in ways:
            overrides = [*PLAIN, *([LORA] if way == "lora" else []), *said.get("overrides", [])]
            others = {key: said[key] for key in ("before", "commands", "marks") if key in said}
            runs.append(Run(name, way, said["recipe"], overrides, **others))
    return runs


def filled(value: Any, places: Mapping[str, str]) -> Any:
    """The value with {run}, {runs}, {rows} and {recipe} of its texts filled in."""
    if isinstance(value, str):
        return re.sub(r"\{(run|runs|rows|recipe)\}", lambda m: places[m[1]], value)
    if isinstance(value, list):
        return [filled(v, places) for v in value]
    if isinstance(value, dict):
        return {k: filled(v, places) for k, v in value.items()}
    return value


def places_of(folder: Path) -> dict[str, str]:
    """What a run's words stand for."""
    runs = folder / "runs"
    return {"run": f"{runs}/run", "runs": str(runs), "rows": f"{GOLDEN}/rows", "recipe": f"{folder}/tiny.yaml"}


def write_recipe(run: Run, folder: Path) -> None:
    """The run's recipe, as a file."""
    places = places_of(folder)
    # By way of JSON: what stands in two places would become an alias.
    recipe = json.loads(json.dumps(filled({"runs": places["runs"], **run.recipe}, places)))
    Path(places["recipe"]).write_text(yaml.safe_dump(recipe, sort_keys=False), "utf-8")


def perform(run: Run, folder: Path) -> dict[str, Any] | None:
    """Train, and what else the run does, in this process; returns what it left, but as one of several the first's.

    Raises:
        RuntimeError: a command failed.
    """
    from rlpost.cli.launchers import ON_RANKS

    places, runs = places_of(folder), folder / "runs"
    if run.before is not None:
        command(folder, ["train", places["recipe"], *run.overrides, *run.before])
    command(folder, ["train", places["recipe"], *run.overrides])
    shared, said = True, []
    for number, words in enumerate(run.commands):
        words = filled(list(words), places)
        if "--recipe" in words:
            words += run.overrides
        shared = shared and words[0] in ON_RANKS
        if not shared and not alone_again():
            return None
        out = command(folder, words)
        said.append([_plain(line, places) for line in out.splitlines()])
        written = runs / "run/out.jsonl"
        if written.exists() and os.environ.get("RANK", "0") == "0":
            said[number] += read_lines(written)
            written.unlink()
    if not alone_again():
        return None
    return {"stages": left(runs / "run"), "evaluation": evaluated(runs / "run"), "commands": said}


def alone_again() -> bool:
    """Whether this process goes on alone: the first of several does."""
    from rlpost import ranks

    first = ranks.is_first()
    ranks.leave()
    for name in RANK:
        os.environ.pop(name, None)
    return first


def command(folder: Path, words: Sequence[str]) -> str:
    """`rlpost WORDS` in this process; returns what it printed.

    Raises:
        RuntimeError: it failed, with its last line.
    """
    from rlpost.__main__ import main

    number = os.environ.get("RANK", "0")
    out, err = folder / f"out{number}", folder / f"err{number}"
    code: object = 0
    sys.argv = ["rlpost", *words]
    with out.open("wb") as o, err.open("wb") as e:
        os.dup2(o.fileno(), 1)
        os.dup2(e.fileno(), 2)
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        sys.stdout.flush()
        sys.stderr.flush()
    if code:
        last = (err.read_text("utf-8").strip().splitlines() or ["nothing was said"])[-1]
        raise RuntimeError(f"rlpost {words[0]} ended with exit code {code}: {last}")
    return out.read_text("utf-8")


def _plain(line: str, places: Mapping[str, str]) -> Any:
    """A line that was printed: as JSON if it is some, without paths of this machine."""
    line = line.replace(places["run"], "{run}")
    with suppress(ValueError):
        return json.loads(line)
    return line


def left(run: Path) -> dict[str, Any]:
    """What training left of every stage that leaves something."""
    stages = {}
    for final in sorted(run.glob("*/final")):
        stage = final.parent
        found: dict[str, Any] = {"metrics": read_lines(stage / "metrics.jsonl"), "rollouts": {}}
        for file in sorted(stage.glob("rollouts/*.jsonl")):
            found["rollouts"][file.stem] = [rollout(row) for row in read_lines(file)]
        found["rows"] = read_lines(final / "rows.jsonl")
        found["weights"] = {f.name: statistics(f) for f in sorted(final.glob("*.safetensors"))}
        stages[stage.name] = {name: value for name, value in found.items() if value}
    return stages


def rollout(row: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt with its completions, of which only what was sampled and what it earned."""
    kept = ("text", "reward", "finish", "ids", "action", "logprobs")
    completions = [{k: c[k] for k in kept} for c in row["completions"]]
    for c in completions:
        c["logprobs"] = [float(f"{x:.{DIGITS}g}") for x in c["logprobs"]]
    return {"prompt": row["prompt"], "completions": completions}


def evaluated(run: Path) -> dict[str, Any]:
    """What evaluations left: numbers, and every answer."""
    files = [*run.glob("evaluation/*.json"), *run.glob("evaluation/*.jsonl")]
    return {f.name: read_lines(f) if f.suffix == ".jsonl" else json.loads(f.read_text("utf-8")) for f in sorted(files)}


def read_lines(file: Path) -> list[Any]:
    """The rows of a .jsonl file; none if it is not there."""
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []


def statistics(file: Path) -> dict[str, Any]:
    """A weight file in a few numbers: how many, their size, and two sums in which each has a weight of its own."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(file)
    flat = torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])
    at = torch.arange(len(flat), dtype=torch.float64)
    return {
        "tensors": len(tensors),
        "numbers": len(flat),
        "norm": float(flat.norm()),
        "size": float(flat.abs().sum()),
        "sums": [float((flat * wave(at)).sum()) for wave in (lambda x: (0.7 * x).cos(), lambda x: (1.3 * x + 1).cos())],
    }


def _child(run: Run, folder: Path, rank: Mapping[str, str], pipe: Any) -> None:
    os.environ |= rank
    try:
        found: Any = perform(run, folder)
    except BaseException as error:
        found = f"{type(error).__name__}: {error}"
    pipe.send(found)
    pipe.close()


def performed(run: Run, ranks: int = 1) -> dict[str, Any] | str:
    """What the run left, from a process of its own, or from several; or in a line why it failed."""
    with tempfile.TemporaryDirectory() as folder:
        write_recipe(run, Path(folder))
        context = multiprocessing.get_context("fork")
        children = []
        for rank in ranks_of(ranks):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(run, Path(folder), rank, theirs))
            process.start()
            theirs.close()
            children.append((process, ours))
        results = [_received(pipe) for _, pipe in children]
        for process, _ in children:
            if process.is_alive() and any(isinstance(found, str) for found in results):
                process.kill()
            process.join()
    failed = [found for found in results if isinstance(found, str)]
    return failed[0] if failed else results[0]


def ranks_of(count: int) -> list[dict[str, str]]:
    """The environment of each of so many processes of one run; of one process, nothing."""
    if count == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = ("127.0.0.1", port, str(count))
    return [dict(zip(RANK, (*shared, str(n), str(n), str(count)), strict=True)) for n in range(count)]


def _received(pipe: Any) -> Any:
    try:
        return pipe.recv() if pipe.poll(LONGEST) else f"took more than {LONGEST:.0f} seconds"
    except EOFError:
        return "its process ended"


def compare(found: Any, expected: Any, tolerance: float, absolute: float) -> Difference:
    """How a result differs from its reference."""
    difference = Difference()
    for place, a, b in _leaves(found, expected, ""):
        numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (a, b))
        if numbers and (isinstance(a, float) or isinstance(b, float)):
            gap = abs(a - b)
            allowed = tolerance * abs(b) + absolute
            share = gap / allowed if allowed else math.inf if gap else 0.0
            if share > difference.worst:
                difference.worst, difference.where = share, f"{place}: {a!r}, was {b!r}"
            difference.largest = max(difference.largest, gap)
        elif a != b:
            difference.others.append(f"{place}: {_short(a)}, was {_short(b)}")
    return difference


_MISSING = "nothing"


def _leaves(a: Any, b: Any, place: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*b, *(k for k in a if k not in b)]:
            yield from _leaves(a.get(key, _MISSING), b.get(key, _MISSING), f"{place}/{key}")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _leaves(x, y, f"{place}/{i}")
    else:
        yield place, a, b


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def checked(run: Run, exact: bool, ranks: int) -> tuple[str, bool]:
    """A line of the table, and whether run and reference agree."""
    found = performed(run, ranks)
    head = f"{run.key:28} {run.kinds[:34]:34}"
    if isinstance(found, str):
        return f"{head} {'-':>5} {'-':>9}  FAILED {found}", False
    if not run.file.exists():
        return f"{head} {'-':>5} {'-':>9}  NO REFERENCE", False
    expected = json.loads(run.file.read_text("utf-8"))["left"]
    # By way of JSON, in which the reference is.
    limits = (0.0, 0.0) if exact else (TOLERANCE, ABSOLUTE) if ranks == 1 else OF_RANKS
    found = json.loads(json.dumps(found))
    for one in (found, expected) if ranks > 1 else ():
        leave_out_rounding(one)
    difference = compare(found, expected, *limits)
    good = not difference.others and difference.worst <= 1
    verdict = "same" if good else "DIFFERS"
    line = f"{head} {'no' if difference.others else 'yes':>5} {difference.largest:9.1e}  {verdict}"
    for place in difference.others[:3]:
        line += f"\n    {place}"
    if len(difference.others) > 3:
        line += f"\n    and {len(difference.others) - 3} more"
    if difference.worst > 1:
        line += f"\n    {difference.where}"
    return line, good


def leave_out_rounding(found: Mapping[str, Any]) -> None:
    """Take out the metrics that are nothing but rounding: they differ where an update is cut in another way."""
    for stage in found["stages"].values():
        for row in stage.get("metrics", ()):
            for name in ROUNDING:
                row.pop(name, None)


def written(run: Run, reason: str | None) -> tuple[str, bool]:
    """Write the run's reference; a line about it, and whether all went well."""
    earlier = json.loads(run.file.read_text("utf-8")) if run.file.exists() else None
    if earlier is not None and reason is None:
        return f"{run.key:28} kept: replaced only with --reason", True
    if earlier is not None and not run.marks:
        return f"{run.key:28} REFUSED: its numbers have no reason to change", False
    found = performed(run)
    if isinstance(found, str):
        return f"{run.key:28} FAILED {found}", False
    reasons = [*earlier["reasons"], reason] if earlier else []
    text = json.dumps({"reasons": reasons, "left": found}, separators=(",", ":"))
    run.file.parent.mkdir(exist_ok=True)
    # A line a stage, so that a change can be looked at.
    run.file.write_text(re.sub(r'(?<=[{,])("(?:metrics|rollouts|rows|weights)":)', r"\n\1", text) + "\n", "utf-8")
    return f"{run.key:28} written, {run.file.stat().st_size} bytes", True


def prepare(package: Path) -> None:
    """Choose whose rlpost is run, and import what takes long."""
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    sys.path.insert(0, str(package))
    for name in HEAVY:
        importlib.import_module(name)
    # Collecting garbage in a run need not look through all of that again.
    gc.collect()
    gc.freeze()
    import rlpost

    print(f"rlpost of {Path(rlpost.__file__).parents[1]}", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--compare", action="store_true", help="compare with the references (so by default)")
    what.add_argument("--write", action="store_true", help="write references that are missing")
    what.add_argument("--list", action="store_true", help="print the runs, and stop")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these (sft: both ways; sft-lora)")
    parser.add_argument("--way", choices=("full", "lora"), help="only these: half of all")
    parser.add_argument("--exact", action="store_true", help="numbers too must be the same, bit for bit")
    parser.add_argument("--ranks", type=int, default=1, help="processes of each run, compared with one process's")
    parser.add_argument("--strategy", choices=("ddp", "fsdp2"), default="ddp", help="what each process keeps")
    parser.add_argument("--reason", help="with --write: why marked runs, named with --only, have other numbers")
    parser.add_argument("--package", type=Path, default=ROOT, help="the tree whose rlpost is run (this one)")
    args = parser.parse_args()
    runs = listed()
    unknown = [name for name in args.only if name not in {n for run in runs for n in (run.name, run.key)}]
    if unknown:
        parser.error(f"there is no run {unknown[0]}: see --list")
    if args.reason and not (args.write and args.only):
        parser.error("--reason goes with --write and --only")
    runs = [run for run in runs if not args.only or {run.name, run.key} & set(args.only)]
    runs = [run for run in runs if args.way in (None, run.way)]
    if args.strategy != "ddp":
        runs = [replace(run, overrides=[*run.overrides, f"parallel.strategy={args.strategy}"]) for run in runs]
    if args.ranks > 1:  # every rank drops at random in its own share
        runs = [run for run in runs if run.name != "sft_dropout"]
    if args.list:
        print("\n".join(f"{run.key:28} {run.kinds:40} {', '.join(run.marks)}".rstrip() for run in runs))
        return 0
    prepare(args.package.resolve())
    begun, good = time.perf_counter(), []
    if not args.write:
        print(f"{'run':28} {'kind':34} {'ids =':>5} {'largest':>9}  verdict")
    for run in runs:
        line, well = written(run, args.reason) if args.write else checked(run, args.exact, args.ranks)
        print(line, flush=True)
        good.append(well)
    verdict = f"{sum(good)} of {len(good)} {'written or kept' if args.write else 'the same'}"
    print(f"{verdict}, {time.perf_counter() - begun:.0f} s", flush=True)
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
