"""What crosses the pipe to a user's process comes out as it went in, or is refused."""

from __future__ import annotations

import datetime
import json
import math
import random
import uuid
import zoneinfo
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pytest

from rlpost.types import Completion, Group
from rlpost.usercode.wire import CannotCrossError, Seeded, decode, encode

NOON = datetime.datetime(2024, 7, 1, 12, 30, 0, 123456)
COMPLETION = Completion(
    (3, 1 << 30, 0),
    (True, False, True),
    "é\ud83d\n",
    "stop",
    (-0.1, 1 / 3),
    (1, 1),
    step_labels=(0.1, 1),
    reward=-0.1,
    label=True,
    score=2.0,
    weights_version=7,
    step_rewards=(0.0, -1 / 3),
    messages=({"role": "tool", "content": "é", "info": {"n": [1]}},),
)
SAMPLED = Completion((3,), (True,), logprobs=np.float32([-0.1]))
VALUES: list[Any] = [
    *(None, True, 0, -1, 1 << 80, 0.1, -0.0, 5e-324, "", "é\n\ud83d", [], [1, [2.5]], {}, {"a": {"b": [None]}}),
    *(
        (),
        (1, (2, "x")),
        {1, 2},
        frozenset({"a"}),
        b"\x00\xff",
        bytearray(b"x"),
        {"$": "dict", "v": 1},
        {1: "a", (2,): "b"},
    ),
    *(NOON, NOON.replace(fold=1), NOON.replace(tzinfo=datetime.UTC), NOON.date(), NOON.time()),
    NOON.replace(tzinfo=datetime.timezone(datetime.timedelta(hours=5, minutes=30))),
    NOON.replace(tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")),
    *(datetime.timedelta(days=-1, microseconds=3), Decimal("1.10"), uuid.UUID(int=7), 1 + 2j),
    *(np.float32(0.1), np.int8(-3), np.bool_(True), np.datetime64("2024-01-01T00:00:00")),
    *(pd.Timestamp("2024-01-01 00:00:00.000000001"), pd.Timestamp("2024-07-01", tz="Europe/Berlin")),
    *(COMPLETION, SAMPLED, Group((1, 2), (COMPLETION,), {"row": 1})),
]


def there_and_back(value: Any) -> Any:
    return decode(json.loads(json.dumps(encode(value)).encode()))


@pytest.mark.parametrize("value", VALUES, ids=lambda value: f"{type(value).__name__}")
def test_values_come_out_as_they_went_in(value):
    found = there_and_back(value)
    assert type(found) is type(value)
    if isinstance(value, Completion | Group):
        assert found.same(value)
    else:
        assert found == value
    assert repr(found) == repr(value)
    assert getattr(found, "fold", 0) == getattr(value, "fold", 0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite(value):
    assert repr(there_and_back(value)) == repr(value)


@pytest.mark.parametrize("value", [np.arange(6.0).reshape(2, 3), np.zeros((0, 2), np.int16), np.array(["a", "bc"])])
def test_arrays_keep_type_shape_and_values(value):
    found = there_and_back({"x": value})["x"]
    assert (found.dtype, found.shape) == (value.dtype, value.shape)
    assert (found == value).all()
    found.fill(found.flat[0] if found.size else 0)  # it can be written to


def test_a_generator_goes_on_with_the_same_numbers():
    found, same = there_and_back(Seeded(5)), random.Random(5)
    assert [found.random() for _ in range(3)] == [same.random() for _ in range(3)]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (object(), "a object"),
        ({"a": [1, lambda: 0]}, "a function at a[1]"),
        (random.Random(1), "a random.Random"),
        (np.array([object()]), "a numpy.ndarray"),
        (type("Number", (int,), {})(3), "Number"),
    ],
)
def test_what_has_no_faithful_form_is_refused(value, told):
    with pytest.raises(CannotCrossError) as caught:
        encode(value)
    assert told in str(caught.value)


def test_what_is_decoded_is_new_each_time():
    sent = json.loads(json.dumps(encode({"a": [1]})))
    first = decode(sent)
    first["a"].append(2)
    assert decode(sent) == {"a": [1]}
