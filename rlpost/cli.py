"""The command line: parse, one call, print. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import os
import re
from dataclasses import asdict
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from rlpost import exits
from rlpost.arguments import columns, home, picture, target
from rlpost.as_text import figures, print_result, show_yaml
from rlpost.launchers import refuse_several_processes
from rlpost.results import emit, kept_for_results
from rlpost.streams import from_stdin

if TYPE_CHECKING:
    from rlpost.recipe.resolve import Resolved

# Nothing heavy is imported up here: what a command needs, it imports itself, and --help stays quick.
# rich_markup_mode=None: help by rich takes twice the time.
app = typer.Typer(
    help="Language models through SFT, preference optimisation and reinforcement learning, from one recipe.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class _Command(TyperCommand):
    """A command whose stdout is for results alone; its help is printed before it is invoked."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        from rlpost.usercode.process import end_all

        try:
            with kept_for_results():
                return super().invoke(ctx)
        finally:
            end_all()


_command = partial(app.command, cls=_Command)

_Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A .yaml file, or the name of a packaged recipe.")]
_Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings, like stages.grpo.group_size=16."),
]
_Json = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON (eval: one line a sample, then the summary).")
]
_OtherRecipe = Annotated[str | None, typer.Option("--recipe", help="Recipe to take settings from.", callback=home)]
_Checkpoint = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="A run, a stage or checkpoint in it, or a model.", callback=home)
]

_Guide = Annotated[
    str | None, typer.Option("--guide", help="A value network: weighs tokens by where they lead.", callback=home)
]
_Goal = Annotated[list[str] | None, typer.Option("--goal", help="With --guide: end in this text; may be repeated.")]
_Avoid = Annotated[list[str] | None, typer.Option("--avoid", help="With --guide: never end so; may be repeated.")]
_Candidates = Annotated[
    int, typer.Option("--candidates", min=0, help="With --guide: likeliest tokens weighed; 0: all.")
]
_BestOf = Annotated[
    int | None,
    typer.Option("--best-of", min=2, help="Of so many, the best by the rewards of --recipe, or by --judge."),
]
_Example = Annotated[
    list[str] | None,
    typer.Option("--example", help="COLUMN=TEXT of the prompt's row, for rewards that read it; may be repeated."),
]
_Judge = Annotated[
    str | None,
    typer.Option("--judge", help="A reward model or a reverse model: its run's stage, or a checkpoint.", callback=home),
]


@_command()
def train(
    recipe: _Recipe,
    overrides: _Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
    as_json: _Json = False,
    allow_change: Annotated[
        bool, typer.Option("--allow-change", help="Go on with a run whose recipe has changed.")
    ] = False,
) -> None:
    """Run a recipe's stages, resuming what is unfinished; prints the last checkpoint's path."""
    resolved = _resolve(recipe, overrides)
    from rlpost import pipeline

    if dry_run:
        lines = pipeline.dry_run(resolved)
        print_result({"plan": lines} if as_json else "\n".join(lines))
        return
    path = pipeline.train(resolved, allow_change)
    run = Path(resolved.config.runs) / resolved.config.run
    print_result({"checkpoint": str(path), "run": str(run)} if as_json else path)


@_command("eval")
def evaluate(
    checkpoint: Annotated[
        str | None, typer.Argument(metavar="[CHECKPOINT]", help="By default the newest finished run.", callback=home)
    ] = None,
    overrides: _Overrides = None,
    recipe: _OtherRecipe = None,
    as_json: _Json = False,
) -> None:
    """Evaluate a checkpoint as its recipe says, or as another one does."""
    words = list(overrides or [])
    if checkpoint is not None and re.match(r"[\w.\[\]-]+=", checkpoint) and not Path(checkpoint).exists():
        words.insert(0, checkpoint)
        checkpoint = None
    from rlpost import commands

    prompts, result, path = commands.evaluate(checkpoint, recipe, words)
    if as_json:
        for row in commands.sample_rows(prompts, result):
            print_result(row)
        print_result({"checkpoint": path, "summary": result.to_json()})
    else:
        print_result("\n".join(figures({"checkpoint": path, **result.to_json()})))


@_command()
def sample(
    checkpoint: _Checkpoint,
    prompt: Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="By default read from stdin.")] = None,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="How many completions.")] = 1,
    temperature: Annotated[float, typer.Option("--temperature")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 256,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="0: all tokens.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p")] = 1.0,
    min_p: Annotated[float, typer.Option("--min-p")] = 0.0,
    greedy: Annotated[bool, typer.Option("--greedy", help="The likeliest token, always.")] = False,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="Ends a completion; may be repeated.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    best_of: _BestOf = None,
    recipe: _OtherRecipe = None,
    example: _Example = None,
    judge: _Judge = None,
    guide: _Guide = None,
    goal: _Goal = None,
    avoid: _Avoid = None,
    candidates: _Candidates = 32,
    as_json: _Json = False,
) -> None:
    """Complete a prompt; a reverse model says what comes before it."""
    if (guide is None) != (not goal and not avoid) or (goal and avoid):
        raise typer.BadParameter("goes with either --goal or --avoid", param_hint="--guide")
    if best_of is not None and (recipe is None) == (judge is None):
        raise typer.BadParameter(
            "needs either --recipe, whose rewards choose the best, or --judge", param_hint="--best-of"
        )
    if best_of is None and judge is not None:
        raise typer.BadParameter("chooses among several: give --best-of too", param_hint="--judge")
    if example and recipe is None:
        raise typer.BadParameter("is what the rewards of --recipe read: give that too", param_hint="--example")
    text = from_stdin("PROMPT") if prompt is None else prompt
    from rlpost import commands
    from rlpost.engine.params import Sampling
    from rlpost.recipe.ranges import out_of_range

    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, min_p, stop or [])
    for problem in out_of_range(sampling, "--"):
        raise typer.BadParameter(problem.replace("--.", "--").replace("_", "-"))
    if "" in sampling.stop:
        raise typer.BadParameter("an empty text stops every completion at once", param_hint="--stop")
    lead = commands.Lead(guide, tuple(goal or avoid or ()), bool(avoid), candidates) if guide else None
    texts = commands.sample(
        checkpoint,
        text,
        sampling=sampling,
        n=n,
        greedy=greedy,
        seed=seed,
        best_of=best_of,
        recipe=recipe,
        example=columns(example or [], "--example"),
        judge=judge,
        lead=lead,
    )
    for completion in texts:
        print_result({"prompt": text, "completion": completion} if as_json else completion)


@_command()
def infill(
    forward: Annotated[
        str, typer.Argument(metavar="FORWARD", help="A run, a stage or checkpoint in it, or a model.", callback=home)
    ],
    reverse: Annotated[
        str, typer.Argument(metavar="REVERSE", help="A stage with direction: reverse, or its result.", callback=home)
    ],
    before: Annotated[str, typer.Argument(metavar="BEFORE", help="How the text begins.")],
    after: Annotated[str, typer.Argument(metavar="AFTER", help="How it ends.")],
    n: Annotated[int, typer.Option("--candidates", "-n", min=1, help="Samples of each model.")] = 16,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Of the longest middle.")] = 32,
    temperature: Annotated[float, typer.Option("--temperature")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    top: Annotated[int, typer.Option("--top", min=1, help="Print so many, best first.")] = 5,
    begin: Annotated[
        bool, typer.Option(help="FORWARD was trained on texts that begin with the begin token, as `text` rows do.")
    ] = True,
    as_json: _Json = False,
) -> None:
    """Fill in what stands between two texts, searching from both ends."""
    from rlpost import commands, console
    from rlpost.engine.params import Sampling
    from rlpost.recipe.ranges import out_of_range

    sampling = Sampling(max_new_tokens, temperature)
    for problem in out_of_range(sampling, "--"):
        raise typer.BadParameter(problem.replace("--.", "--").replace("_", "-"))
    found, sampled = commands.infill(forward, reverse, before, after, n=n, sampling=sampling, seed=seed, begin=begin)
    rows = [(text, f"{m.forward:.3f}", f"{m.reverse:.3f}", f"{m.score:.3f}") for text, m in found[:top]]
    title = f"{len(found)} middles ranked, {sampled} tokens sampled"
    console.table(title, ["middle", "log p forward", "log p reverse", "sum"], rows)
    for text, m in found[:top]:
        print_result({"middle": text, "forward": m.forward, "reverse": m.reverse} if as_json else text)


@_command()
def pairs(
    checkpoint: _Checkpoint,
    recipe: Annotated[str, typer.Option("--recipe", help="Recipe with the prompts and the rewards.", callback=home)],
    out: Annotated[str, typer.Option("--out", help="The .jsonl file to write.", callback=target)],
    overrides: _Overrides = None,
) -> None:
    """Write preference pairs from a model's own samples, ranked by a recipe's rewards."""
    from rlpost import commands

    print_result(commands.pairs(checkpoint, recipe, out, list(overrides or [])))


@_command()
def show(
    recipe: _Recipe,
    overrides: _Overrides = None,
    rows: Annotated[int, typer.Option("--rows", min=0, help="Also show so many rows as the model sees them.")] = 0,
) -> None:
    """Print a recipe with everything filled in."""
    from rlpost import console

    resolved = _resolve(recipe, overrides)
    for warning in resolved.warnings:
        console.warn(warning)
    lines: list[str] = []
    if rows:
        from rlpost import commands

        lines = commands.show_rows(resolved, rows)
    show_yaml(resolved.to_yaml().removesuffix("\n"))
    for line in lines:
        emit(line)


class Proof(StrEnum):
    """What `rlpost verify` proves."""

    objectives = "objectives"
    goals = "goals"


@_command()
def verify(
    what: Annotated[Proof, typer.Argument(help="Objectives, or goals and guided decoding.")] = Proof.objectives,
    vocab: Annotated[int, typer.Option("--vocab", min=2, help="Tokens, the end token among them.")] = 3,
    depth: Annotated[int, typer.Option("--depth", min=2, help="Tokens of the longest completion.")] = 3,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of tree, policy and rewards.")] = 0,
    as_json: _Json = False,
) -> None:
    """Prove the objectives on a token tree small enough to sum over; fails if what must be exact is not."""
    from rlpost.goals.verify import verify_goals
    from rlpost.oracle.verify import verify as verify_objectives

    prove = verify_goals if what is Proof.goals else verify_objectives
    report = prove(vocab, depth, seed)
    print_result(report.to_json() if as_json else report.text())
    if not report.ok:
        raise typer.Exit(1)


@_command()
def calibrate(
    network: Annotated[
        str, typer.Argument(metavar="NETWORK", help="A value network: its run's stage, or a checkpoint.", callback=home)
    ],
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="Whose completions are enumerated.")],
    goal: Annotated[list[str], typer.Option("--goal", help="Ending that it is asked about; may be repeated.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="As it was trained with.")],
    policy: Annotated[
        str | None,
        typer.Option("--policy", help="Whose completions; by default the model it was trained beside.", callback=home),
    ] = None,
    least: Annotated[float, typer.Option("--least", min=0, help="Rarer states are not followed.")] = 1e-5,
    as_json: _Json = False,
) -> None:
    """Compare a value network with the truth, on all likely completions of prompts."""
    from rlpost.goals import calibration
    from rlpost.goals.value_network import read_settings
    from rlpost.run.lookup import find_checkpoint, parent_of

    folder = find_checkpoint(network) or Path(network)
    read_settings(folder)  # which says so if it is no value network, before one asks whose it is
    model = (find_checkpoint(policy) or Path(policy)) if policy else parent_of(folder)
    found = list(calibration.calibrations(folder, model, prompts, goal, max_new_tokens, least))
    if as_json:
        for asked in found:
            print_result(asdict(asked))
    else:
        calibration.print_table(found)


class Picture(StrEnum):
    """What `rlpost plot` draws."""

    maze = "maze"


@_command()
def plot(
    what: Annotated[Picture, typer.Argument(help="The kind of picture.")],  # noqa: ARG001 - there is one so far
    run: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a finished run.", callback=home)],
    out: Annotated[
        str | None, typer.Option("--out", help="The .png file; RUN/maze.png by default.", callback=picture)
    ] = None,
    stage: Annotated[str | None, typer.Option("--stage", help="Whose policy; the last one by default.")] = None,
    mazes: Annotated[int, typer.Option("--mazes", min=1, help="How many are drawn.")] = 3,
) -> None:
    """Draw what a run knows of its mazes beside the exact solution; prints the picture's path."""
    from rlpost import console
    from rlpost.goals import escape, maze

    found = maze.solved(Path(run), stage)
    for s in found[:mazes]:
        console.say("\n".join(["", *maze.in_text(s)]))
    file = Path(out) if out else Path(run) / "maze.png"
    maze.draw(found[:mazes], file)
    console.say("\n".join(["", *maze.report(found), *escape.escapes(Path(run), stage)]))
    print_result(file)


@_command("list")
def list_(
    runs: Annotated[str, typer.Option("--runs", help="The folder of runs.", callback=home)] = "runs",
    as_json: _Json = False,
) -> None:
    """List packaged recipes and runs."""
    from rlpost.recipe.files import listing
    from rlpost.run.layout import list_runs

    if runs != "runs" and not Path(runs).is_dir():
        raise typer.BadParameter(f"{runs} is no folder", param_hint="--runs")
    recipes = [(recipe.name, recipe.description) for recipe in listing()]
    found = [
        (str(run.path), ", ".join(f"{k} {v}".strip() for k, v in run.stages.items())) for run in list_runs(Path(runs))
    ]
    if as_json:
        print_result({"recipes": dict(recipes), "runs": dict(found)})
        return
    for title, lines in (("recipes", recipes), (f"runs in {runs}/", found)):
        width = max((len(name) for name, _ in lines), default=0)
        print_result(f"{title}:")
        print_result("\n".join(f"  {name:<{width}}  {text}".rstrip() for name, text in lines) or "  none")


def _resolve(recipe: str, overrides: list[str] | None) -> Resolved:
    from rlpost.recipe.resolve import resolve

    return resolve(recipe, overrides or [])


@app.callback()
def _before(context: typer.Context) -> None:
    if context.invoked_subcommand not in ("list", "show", "verify"):
        refuse_several_processes(os.environ)


def main() -> None:
    """Run the command line; whatever goes wrong is one line on stderr and an exit code."""
    exits.run(app)
