"""The `rlpost` command line: its commands and its entry point."""

from __future__ import annotations

import os
from collections.abc import Callable

import typer

from rlpost import ranks
from rlpost.cli import (
    chat,
    compare,
    completion,
    copy,
    doctor,
    evaluate,
    exits,
    import_gguf,
    lists,
    merge,
    pairs,
    push,
    report,
    rollouts,
    sample,
    schema,
    serve,
    show,
    sweep,
    train,
    verify,
)
from rlpost.cli.command import Command, Sections
from rlpost.cli.goals import calibrate, infill, plot
from rlpost.cli.goals import sample as goals_sample
from rlpost.cli.importing import importing
from rlpost.cli.launchers import ON_RANKS, end_with_launcher, is_rank, refuse_several_processes

# Commands import torch and the like only when they run: --help stays quick.
# rich_markup_mode=None: help by rich takes twice the time.
app = typer.Typer(
    cls=Sections,
    help="Language models through SFT, preference learning and RL, from one recipe.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
goals = typer.Typer(
    help="Value networks and reverse models.",
    rich_markup_mode=None,
    no_args_is_help=True,
)
COMMANDS: dict[str, Callable[..., None]] = {
    "train": train.train,
    "sweep": sweep.sweep,
    "eval": evaluate.evaluate,
    "compare": compare.compare,
    "report": report.report,
    "rollouts": rollouts.rollouts,
    "sample": sample.sample,
    "chat": chat.chat,
    "pairs": pairs.pairs,
    "serve": serve.serve,
    "merge": merge.merge,
    "push": push.push,
    "import-gguf": import_gguf.import_gguf,
    "copy": copy.copy,
    "show": show.show,
    "schema": schema.schema,
    "verify": verify.verify,
    "list": lists.list_,
    "doctor": doctor.doctor,
}
GOALS: dict[str, Callable[..., None]] = {
    "sample": goals_sample.sample,
    "infill": infill.infill,
    "calibrate": calibrate.calibrate,
    "plot": plot.plot,
}
for group, commands in ((app, COMMANDS), (goals, GOALS)):
    for name, function in commands.items():
        group.command(name, cls=Command)(function)
app.add_typer(goals, name="goals")


_ANYWHERE = ("copy", "doctor", "list", "report", "rollouts", "schema", "show", "verify")
"""Commands that several processes may run."""


@app.callback()
def _before(context: typer.Context) -> None:
    anywhere = context.invoked_subcommand in _ANYWHERE
    if context.invoked_subcommand in ON_RANKS and is_rank(os.environ):
        with importing():
            import torch  # noqa: F401 - which takes long
        end_with_launcher()
        ranks.start()
    elif not anywhere:
        refuse_several_processes(os.environ)


def main() -> None:
    """Run the command line; an error is one line on stderr and an exit code."""
    completion.prepare(os.environ)
    exits.run(app)
