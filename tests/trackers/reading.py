"""What trackers hold of a run, read from the files that they wrote, without rlpost."""

from __future__ import annotations

import json
import sqlite3
import struct
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Found:
    numbers: dict[tuple[str, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    """(metric, step) -> every value that stands there."""
    tables: dict[tuple[str, int], list[str]] = field(default_factory=lambda: defaultdict(list))
    """(table, step) -> the text of every table that stands there."""
    runs: set[str] = field(default_factory=set)
    config: str = ""
    """The text of the settings."""


def tensorboard(runs: Path) -> Found:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    found = Found()
    for file in runs.rglob("events.out.tfevents.*"):
        found.runs.add(str(file.parent))
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                name, text = value.tag.removesuffix("/text_summary"), value.tag.endswith("/text_summary")
                held = make_ndarray(value.tensor)
                if name == "config":
                    found.config += held.reshape(-1)[0].decode()
                elif text:
                    found.tables[name, event.step].append(held.reshape(-1)[0].decode())
                else:
                    found.numbers[name, event.step].append(held.item())
                    assert held.dtype == "float32"  # TensorBoard's quick loader leaves out others
    return found


def wandb(runs: Path) -> Found:
    from wandb.proto.wandb_internal_pb2 import Record

    found = Found()
    rows = set()
    for file in sorted(runs.rglob("*.wandb")):
        for data in _records(file.read_bytes()):
            record = Record.FromString(data)
            if record.HasField("run"):
                found.runs.add(record.run.run_id)
                found.config += "".join(f"{u.key}={u.value_json}" for u in record.run.config.update)
            if record.HasField("history"):
                row = _row(record.history.item)
                assert row["_step"] not in rows, row["_step"]
                rows.add(row["_step"])
                for name, value in row.items():
                    step = row.get(_axis(name))
                    if isinstance(value, dict) and not name.startswith("_"):
                        found.tables[name, step].append((file.parent / "files" / value["path"]).read_text("utf-8"))
                    elif not name.startswith("_") and not name.endswith("/step"):
                        found.numbers[name, step].append(value)
    return found


def mlflow(runs: Path) -> Found:
    from mlflow import MlflowClient

    client, found = MlflowClient(f"sqlite:///{runs / 'mlflow.db'}"), Found()
    for run in client.search_runs([client.get_experiment_by_name("rlpost").experiment_id]):
        found.runs.add(run.info.run_id)
        found.config += str(run.data.params)
        for name in run.data.metrics:
            for metric in client.get_metric_history(run.info.run_id, name):
                found.numbers[name, metric.step].append(metric.value)
    for file in (runs / "mlflow.artifacts").rglob("*.json"):
        name, _, step = file.stem.rpartition("-")
        found.tables[f"{file.parent.name}/{name}", int(step)].append(file.read_text("utf-8"))
    return found


def trackio(runs: Path) -> Found:
    found = Found()
    with sqlite3.connect(runs.parent / "trackio" / "rlpost.db") as base:
        for run, text in base.execute("select run_id, metrics from metrics"):
            found.runs.add(run)
            row = json.loads(text)
            for name, value in row.items():
                step = row[_axis(name)]
                if isinstance(value, dict):
                    found.tables[name, step].append(json.dumps(value))
                elif not name.endswith("/step"):
                    found.numbers[name, step].append(value)
        found.config = "".join(bytes(text).decode() for (text,) in base.execute("select config from configs"))
    return found


READ: dict[str, Callable[[Path], Found]] = {
    "tensorboard": tensorboard,
    "wandb": wandb,
    "mlflow": mlflow,
    "trackio": trackio,
}


def _axis(metric: str) -> str:
    """The name under which the step of a metric stands in its row."""
    stage, _, name = metric.partition("/")
    return f"{stage}/eval/step" if name.startswith("eval/") else f"{stage}/step"


def logged(run: Path, *stages: str) -> dict[tuple[str, int], list[float]]:
    """The same of the logs of a run."""
    numbers = {}
    for stage in stages:
        for log, series in (("metrics", stage), ("evaluations", f"{stage}/eval")):
            file = run / stage / f"{log}.jsonl"
            for row in map(json.loads, file.read_text("utf-8").splitlines() if file.exists() else ()):
                step = row.pop("step")
                numbers |= {(f"{series}/{name}", step): [float(value)] for name, value in row.items()}
    return numbers


def _row(items: Any) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for item in items:
        *above, key = item.nested_key or [item.key]
        place = row
        for name in above:
            place = place.setdefault(name, {})
        place[key] = json.loads(item.value_json)
    return row


def _records(data: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's format of logs, after a header of 7 bytes."""
    block, header = 32768, 7
    place, parts = header, b""
    while place + header <= len(data):
        if block - place % block < header:
            place += block - place % block
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + header])
        parts += data[place + header : place + header + length]
        place += header + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""
