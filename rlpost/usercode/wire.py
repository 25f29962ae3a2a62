"""Encodes values as JSON for the pipe to a user's process: exactly, or not at all.

JSON has null, booleans, numbers, text, lists and objects with text keys. Everything else is an object with the key `$`,
which says what type `v` is.
"""

from __future__ import annotations

import base64
import datetime
import random
import sys
import uuid
import zoneinfo
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from rlpost.types import Completion, Group

_PLAIN = (bool, int, float, str)
_SIMPLE = frozenset((*_PLAIN, type(None)))


class CannotCrossError(Exception):
    """A value of a type that cannot be encoded exactly."""


class Seeded(random.Random):
    """A new random generator, encoded by its seed."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.made_with = seed


class Odd:
    """Stands for a returned value that cannot be encoded; `kind` describes it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind


def encode(value: Any, path: str = "") -> Any:
    """A value in a form for `json.dumps`; `path` is its location, for messages.

    Raises:
        CannotCrossError: it cannot be encoded exactly.
    """
    kind = type(value)
    if value is None or kind in _PLAIN:
        return value
    if kind is dict and "$" not in value and all(type(k) is str and type(v) in _SIMPLE for k, v in value.items()):
        return value
    if kind is list:
        return [encode(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        if all(type(key) is str for key in value) and "$" not in value:
            return {key: encode(item, f"{path}.{key}") for key, item in value.items()}
        return _tagged("dict", [[encode(k, path), encode(item, f"{path}[{k!r}]")] for k, item in value.items()])
    if kind is Completion:
        return _tagged("completion", _packed(value))
    if kind is Group:
        inner = [encode(c) for c in value.completions]
        return _tagged("group", [value.prompt.tolist(), inner, encode(dict(value.example), "example")])
    if kind in (tuple, set, frozenset):
        items = sorted(value, key=repr) if kind is not tuple else value
        return _tagged(kind.__name__, [encode(item, f"{path}[{i}]") for i, item in enumerate(items)])
    return _rarer(value, path)


def _rarer(value: Any, path: str) -> Any:
    kind = type(value)
    if kind in (bytes, bytearray):
        return _tagged(kind.__name__, _base64(value))
    if kind is datetime.datetime:
        return _tagged("datetime", [value.replace(tzinfo=None).isoformat(), value.fold, _zone(value.tzinfo, path)])
    if kind in (datetime.date, datetime.time) and getattr(value, "tzinfo", None) is None:
        return _tagged(kind.__name__, value.isoformat())
    if kind is datetime.timedelta:
        return _tagged("timedelta", [value.days, value.seconds, value.microseconds])
    if kind in (Decimal, uuid.UUID, complex):
        return _tagged(kind.__name__, str(value))
    if kind is Seeded:
        return _tagged("random", value.made_with)
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray | numpy.generic) and not value.dtype.hasobject:
        scalar = isinstance(value, numpy.generic)
        return _tagged("numpy", [scalar, value.dtype.str, list(value.shape), _base64(value.tobytes())])
    pandas: Any = sys.modules.get("pandas")
    if pandas is not None and isinstance(value, pandas.Timestamp):
        return _tagged("timestamp", [value.tz_localize(None).isoformat(), value.fold, _zone(value.tzinfo, path)])
    location = f" at {path.lstrip('.')}" if path else ""
    raise CannotCrossError(f"a {kind.__module__}.{kind.__qualname__}{location}".replace("builtins.", ""))


def decode(value: Any) -> Any:
    """The value that was encoded; lists and objects are new each time."""
    if type(value) is list:
        return [decode(item) for item in value]
    if type(value) is not dict:
        return value
    if "$" not in value:
        return {key: decode(item) for key, item in value.items()}
    return _DECODERS[value["$"]](value["v"])


def _tagged(kind: str, value: Any) -> dict[str, Any]:
    return {"$": kind, "v": value}


def _base64(data: bytes | bytearray) -> str:
    return base64.b64encode(data).decode("ascii")


_ARRAYS = {
    "step_labels": "<f8",
    "step_rewards": "<f8",
    "logprobs": "",
    "ids": "<i4",
    "steps": "<i4",
    "action": "?",
}
"""A completion's arrays, wider numbers first, and their types; log-probabilities keep theirs."""
_VALUES = ("text", "finish", "reward", "label", "score", "weights_version")
"""Its other fields."""


def _packed(c: Completion) -> list[Any]:
    arrays = [getattr(c, name) for name in _ARRAYS]
    data = b"".join([a.tobytes() for a in arrays])
    values = [getattr(c, name) for name in _VALUES]
    return [[len(a) for a in arrays], c.logprobs.dtype.str, _base64(data), values, encode(list(c.messages), "messages")]


def _completion(packed: Sequence[Any]) -> Completion:
    import numpy

    lengths, float_kind, data, values, messages = packed
    raw, at = base64.b64decode(data), 0
    fields: dict[str, Any] = dict(zip(_VALUES, values, strict=True))
    for (name, kind), length in zip(_ARRAYS.items(), lengths, strict=True):
        fields[name] = numpy.frombuffer(raw, kind or float_kind, length, at)
        at += fields[name].nbytes
    return Completion._of_fields({**fields, "messages": tuple(decode(messages))})


def _zone(zone: Any, path: str) -> Any:
    """A time zone as seconds from UTC, or a name of the zone database; None without a zone."""
    if zone is None:
        return None
    if isinstance(zone, datetime.timezone):
        return zone.utcoffset(None).total_seconds()
    name = getattr(zone, "key", None) or getattr(zone, "zone", None)  # zoneinfo's, pytz's
    if not isinstance(name, str):
        raise CannotCrossError(f"a time zone of type {type(zone).__name__} at {path.lstrip('.')}")
    return name


def _in_zone(zone: Any) -> datetime.tzinfo | None:
    if zone is None:
        return None
    if isinstance(zone, str):
        return zoneinfo.ZoneInfo(zone)
    return datetime.timezone(datetime.timedelta(seconds=zone))


def _datetime(packed: Sequence[Any]) -> datetime.datetime:
    text, fold, zone = packed
    return datetime.datetime.fromisoformat(text).replace(tzinfo=_in_zone(zone), fold=fold)


def _timestamp(packed: Sequence[Any]) -> Any:
    import pandas  # type: ignore[import-untyped]

    text, fold, zone = packed
    return pandas.Timestamp(text).replace(tzinfo=_in_zone(zone), fold=fold)


def _numpy(packed: Sequence[Any]) -> Any:
    import numpy

    scalar, dtype, shape, data = packed
    found = numpy.frombuffer(base64.b64decode(data), numpy.dtype(dtype)).reshape(shape).copy()
    return found[()] if scalar else found


_DECODERS: dict[str, Any] = {
    "dict": lambda pairs: {decode(key): decode(item) for key, item in pairs},
    "tuple": lambda items: tuple(decode(items)),
    "set": lambda items: set(decode(items)),
    "frozenset": lambda items: frozenset(decode(items)),
    "bytes": base64.b64decode,
    "bytearray": lambda packed: bytearray(base64.b64decode(packed)),
    "datetime": _datetime,
    "timestamp": _timestamp,
    "date": datetime.date.fromisoformat,
    "time": datetime.time.fromisoformat,
    "timedelta": lambda parts: datetime.timedelta(*parts),
    "Decimal": Decimal,
    "UUID": uuid.UUID,
    "complex": complex,
    "random": random.Random,
    "numpy": _numpy,
    "completion": _completion,
    "group": lambda parts: Group(parts[0], decode(parts[1]), decode(parts[2])),
    "odd": Odd,
}
