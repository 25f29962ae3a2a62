"""Which trackers mirror a run."""

from collections.abc import Iterator

from pydantic import Field

from rlpost.section import Section
from rlpost.suggest import hint_or_list
from rlpost.usercode.params import Lookup

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
"""Each is a module here, an optional package, and the extra of rlpost that installs it."""
TRACKER = Lookup("tracker", "", ("run", "config"), by_name=True, some=True, key="to")


class Logging(Section):
    """What mirrors metrics.jsonl, the evaluation's table and samples (docs/runs.md#trackers)."""

    to: list[str] = Field(default_factory=list)
    """`tensorboard`, `wandb`, `trackio`, `mlflow`, or `file.py:function`, which returns a tracker of yours."""
    project: str = Field("rlpost", min_length=1)
    """Project of wandb and trackio, experiment of mlflow."""
    samples: int = Field(8, ge=0)
    """Rows of a table of samples; 0: no such tables."""

    def problems(self, where: str) -> Iterator[str]:
        """Names that are no tracker, or stand twice."""
        for i, name in enumerate(self.to):
            if name not in TRACKERS and ".py:" not in name:
                near = hint_or_list(name, [*TRACKERS, "file.py:function"], "there are")
                yield f"{where}.to[{i}]: no tracker {name!r}{near}"
            elif short(name) in map(short, self.to[:i]):
                yield f"{where}.to[{i}]: {short(name)!r} stands twice - remove it"


def short(name: str) -> str:
    """A tracker's name without the folders of its file, which may be elsewhere when the run is resumed."""
    return name.rpartition("/")[2]
