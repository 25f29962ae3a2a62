"""JSON with a checksum of itself, so that damage is detected."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

_CHECK = "check"


def seal(value: Mapping[str, Any]) -> bytes:
    """The mapping as readable JSON with its sha256 as `check`."""
    assert _CHECK not in value, "added here"
    return _canonical({**value, _CHECK: hashlib.sha256(_canonical(value)).hexdigest()})


def unseal(data: bytes) -> dict[str, Any] | None:
    """The mapping that `seal` was given; None if the bytes are not what it returned."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    value.pop(_CHECK, None)
    return value if seal(value) == data else None


def _canonical(value: Any) -> bytes:
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()
