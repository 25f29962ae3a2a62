"""MLflow: where MLFLOW_TRACKING_URI says, by default mlflow.db beside the runs."""

from __future__ import annotations

import logging
import os
import re
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from rlpost import console
from rlpost.trackers.api import About, Key, flat, series_of

_VALUE = 6000
"""Characters that MLflow keeps of a parameter."""
_BATCH = 100
"""Parameters that it takes in one call."""
_TAG = "rlpost.run"


class MLflow:
    """A run of MLflow, found again by a tag. It is sent to in a thread: a server may take its time."""

    def __init__(self, about: About) -> None:
        # Waiting between attempts is drawn from Python's random numbers, which are the rewards' too.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._metric: Any = Metric
        self._param: Any = Param
        given = os.environ.get("MLFLOW_TRACKING_URI")
        uri = given or f"sqlite:///{(about.run.parent / 'mlflow.db').resolve()}"
        self._client: Any = MlflowClient(uri)
        place = None if given else (about.run.parent / "mlflow.artifacts").resolve().as_uri()
        found = self._client.get_experiment_by_name(about.project)
        experiment = found.experiment_id if found else self._client.create_experiment(about.project, place)
        runs = self._client.search_runs([experiment], f"tags.`{_TAG}` = '{about.id}'", max_results=1)
        self._id = runs[0].info.run_id if runs else self._begin(experiment, about)
        self._client.update_run(self._id, status="RUNNING")
        self._thread = ThreadPoolExecutor(1, "mlflow")
        self._waiting: deque[Future[None]] = deque()
        console.say(f"mlflow: {uri}")

    def held(self) -> set[Key]:
        """What it has of this run; numbers of one step are written together."""
        found = {
            (series_of(name), metric.step)
            for name in self._client.get_run(self._id).data.metrics
            for metric in self._client.get_metric_history(self._id, name)
        }
        for folder in self._client.list_artifacts(self._id):
            for file in self._client.list_artifacts(self._id, folder.path) if folder.is_dir else ():
                name, _, step = file.path.removesuffix(".json").rpartition("-")
                found.add((name, int(step)))
        return found

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """A metric each, with the step of its stage."""
        now = int(time.time() * 1000)
        batch = [self._metric(_name(name), value, now, step) for name, value in metrics.items()]
        self._later(self._client.log_batch, self._id, batch)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A JSON artifact, as MLflow shows tables."""
        content = {"columns": list(columns), "data": [list(row) for row in rows]}
        self._later(self._client.log_dict, self._id, content, f"{name}-{step:06d}.json")

    def close(self) -> None:
        """Send what is waiting, and mark the run as finished; a resumed one runs again."""
        self._raise_failures(all_of_them=True)
        self._thread.shutdown()
        self._client.set_terminated(self._id)

    def _begin(self, experiment: str, about: About) -> str:
        run: str = self._client.create_run(experiment, run_name=about.run.name, tags={_TAG: about.id}).info.run_id
        params = [self._param(_name(key), str(value)[:_VALUE]) for key, value in flat(about.config).items()]
        for i in range(0, len(params), _BATCH):
            self._client.log_batch(run, params=params[i : i + _BATCH])
        return run

    def _later(self, call: Callable[..., None], *args: Any) -> None:
        self._raise_failures()
        self._waiting.append(self._thread.submit(call, *args))

    def _raise_failures(self, all_of_them: bool = False) -> None:
        try:
            while self._waiting and (all_of_them or self._waiting[0].done()):
                self._waiting.popleft().result()
        except Exception:
            self._thread.shutdown(wait=False, cancel_futures=True)
            raise


def _name(name: str) -> str:
    """The name in the letters that MLflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:250]


def opened(about: About, journal: Sequence[Key]) -> MLflow:  # noqa: ARG001 - it says so itself
    """The tracker of a run."""
    return MLflow(about)
