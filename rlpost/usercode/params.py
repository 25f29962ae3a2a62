"""Functions in recipes: by name, with their arguments and, for those of a user's file, what becomes of failures."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from rlpost.section import Choice, Section


class OnFailure(Choice):
    """What becomes of a failed call of a user's function."""

    stop = "stop"
    """The run stops."""
    unscored = "unscored"
    """There is no reward: nothing is learned from the completion."""


@dataclass(frozen=True)
class Lookup:
    """Where the functions of a key are looked up, and what the program gives them and is given back."""

    name: str
    """What they are, for errors: reward, advantage."""
    module: str
    supplied: tuple[str, ...]
    """Positional arguments, in order; where they go by name, the parameters' names."""
    by_name: bool = False
    some: bool = False
    """By name: a function takes what it needs of them, and not necessarily all."""
    key: str = "fn"
    """The key that names the function."""
    apart: bool = False
    """A function of a user's file is called in a process of its own."""
    by_model: bool = False
    """What the recipe's `args` leave of the parameters, a model gives; keyword-only ones are the recipe's alone."""
    returns: Literal["elements", "tensor", "the same", ""] = ""
    """One number for each element of what it is given, a tensor, or what it was given; else it is not looked at."""


TASKS = "rlpost.data.tasks"

TOOL = Lookup("tool", "rlpost.tools.functions", (), apart=True, by_model=True)


class Function(Section):
    """A function by name, with its keyword arguments."""

    fn: str
    """A name in the module that the key looks in, `task.function` for data, or `file.py:function`."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Its keyword arguments, checked against its signature."""

    @property
    def called(self) -> str:
        """Its name without its file."""
        return self.fn.rpartition(":")[2]


class TimedFunction(Function):
    """A function that, coming from `file.py:function`, is called in a process of its own
    (docs/rewards.md#a-process-of-its-own)."""

    deadline: float | None = Field(None, gt=0)
    """Seconds that a call of a function of a file, or of `verifiers`, may take (60 by default); refused for others."""


EPISODE = "_episode"
"""The parameter that a class environment has as a function (rlpost/usercode/episodes.py)."""
ENVIRONMENT = Lookup("environment", TASKS, ("text", "turns", "example", EPISODE), by_name=True, some=True, apart=True)


class EnvironmentFunction(TimedFunction):
    """A function or a class that answers the model's turns (docs/environments.md)."""

    on_failure: OnFailure | None = None
    """What happens when a function of a file raises, hangs or ends its process: `unscored` leaves the episode without a
    reward. `stop` by default."""


class ToolFunction(TimedFunction):
    """A function that the model can call (docs/tools.md)."""

    max_result: int = Field(4000, ge=1)
    """Most characters of a result that the model reads; a longer one is cut."""


def tool_problems(
    tools: Sequence[ToolFunction], environment: EnvironmentFunction | None, turns: int, where: str
) -> Iterator[str]:
    """What is wrong with the tools of the section at key path `where`, in lines."""
    if not tools:
        return
    if environment is not None:
        yield f"{where}.tools: a turn is answered by tools or by an environment - remove one of the two"
    if turns < 2:
        yield f"{where}.max_turns: {turns} leaves no turn after a tool's result - give at least 2"
    names = [tool.called for tool in tools]
    for i, name in enumerate(names):
        if name in names[:i]:
            yield f"{where}.tools[{i}].fn: there is another tool called {name!r} - give each a name of its own"
