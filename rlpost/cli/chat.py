"""`rlpost chat`."""

from __future__ import annotations

import sys
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Annotated

import typer

from rlpost import console
from rlpost.cli import options
from rlpost.cli.importing import importing
from rlpost.console import clean
from rlpost.errors import DataError, EngineError, RecipeError
from rlpost.results import emit, output
from rlpost.streams import broken, is_terminal

if TYPE_CHECKING:
    from rlpost.inference.chat import Conversation

_HELP = "/again: another answer   /undo: take the last turn back   /quit: end (so does Ctrl-D)"
_System = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="The system message.")]


def chat(
    checkpoint: options.Checkpoint,
    system: _System = None,
    temperature: options.Temperature = 1.0,
    max_new_tokens: options.MaxNewTokens = 512,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    greedy: options.Greedy = False,
    stop: options.Stop = None,
    seed: options.Seed = 0,
) -> None:
    """Talk with a model; a line is a message.

    Lines may come from a file or a pipe too. /again, /undo, /quit.
    """
    sampling = options.sampling_of(
        greedy,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        stop=stop or [],
    )
    with importing():
        from rlpost.inference.chat import open_conversation

    with closing(open_conversation(checkpoint, sampling, system, seed)) as conversation:
        if not conversation.has_template:
            console.say("the model has no chat template: each line is completed by itself")
        if is_terminal(sys.stdin):
            console.say(_HELP)
            with suppress(ImportError):
                import readline  # noqa: F401 - lines can be edited, and earlier ones fetched
        while (line := _line()) is not None and line.strip() != "/quit":
            if line.strip():
                _turn(conversation, line)


def _turn(conversation: Conversation, line: str) -> None:
    """Do what a line says; what cannot be done is said, and the conversation goes on."""
    command = line.strip()
    try:
        if command in ("/again", "/undo") and not conversation.turns:
            console.warn(f"{command}: there is no turn yet")
        elif command == "/undo":
            console.say(f"taken back: {conversation.undo()}")
        elif command == "/again":
            conversation.again(_write)
            emit("")
        elif command.startswith("/") and " " not in command and command[1:].isalpha():
            console.warn(f"{command}: not a command. {_HELP}")
        else:
            conversation.say(line, _write)
            emit("")
    except (DataError, EngineError) as error:
        console.warn(str(error))
    except KeyboardInterrupt:
        emit("")
        console.say("the answer was stopped; it does not count")


def _write(piece: str) -> None:
    emit(clean(piece) if is_terminal(output()) else piece, end="")


def _line() -> str | None:
    """The next line of stdin; None at its end.

    Raises:
        RecipeError: it is not UTF-8.
    """
    try:
        line = input("> ") if is_terminal(sys.stdin) else sys.stdin.readline()
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise RecipeError(f"stdin is not UTF-8 at byte {error.start} - save it as UTF-8") from error
    if broken(line):
        raise RecipeError("stdin is not UTF-8 - save it as UTF-8")
    if not is_terminal(sys.stdin) and not line:
        return None
    return line.removesuffix("\n")
