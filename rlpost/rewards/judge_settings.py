"""The arguments of the reward `judge`, checked before anything is asked."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rlpost.errors import RecipeError
from rlpost.rewards.judge_client import Endpoint, pace_of
from rlpost.rewards.judge_prompts import Criterion, Rubric, check_template, packaged_template
from rlpost.suggest import hint_or_list

_SET_OTHERWISE = {
    "model": "set `model_name`",
    "messages": "write a `template`",
    "temperature": "set `temperature`",
    "max_tokens": "set `max_tokens`",
    "n": "set `votes`",
    "stream": "remove it",
}
"""Keys of a request that other arguments set, or that would change what comes back; and what to do instead."""


def rubric_of(args: Mapping[str, Any], where: str, base: Path) -> Rubric:
    """What the judge is asked.

    Args:
        args: all arguments of `judge`.
        where: their key path.
        base: the folder that the template's path is relative to.

    Raises:
        RecipeError: criteria, scale, pairs or template are wrong, or there is nothing to judge by.
    """
    mode, criteria, template = args["mode"], args["criteria"], args["template"]
    compares = args["pairs"] == "reference"
    if compares and mode != "pairwise":
        raise RecipeError(f"{where}.pairs: is for mode: pairwise - remove it, or set the mode")
    if compares and args["reference"] is None:
        raise RecipeError(f"{where}.reference: missing - name the column of the answers to compare with")
    if criteria is None and template is None:
        raise RecipeError(f"{where}.criteria: missing - say what is judged, as {{right: {{text: 'Is it right?'}}}}")
    shows_reference = args["reference"] is not None and not compares
    text = packaged_template(mode, shows_reference)
    if template is not None:
        text = _read(template, f"{where}.template", base)
        check_template(text, mode, shows_reference, criteria is not None, f"{where}.template")
    verdict = {"winner" if mode == "pairwise" else "score": Criterion("")}
    judged = verdict if criteria is None else _criteria(criteria, f"{where}.criteria")
    return Rubric(mode, judged, _scale(args["scale"], f"{where}.scale"), text)


def endpoint_of(args: Mapping[str, Any], where: str) -> Endpoint:
    """Where the judge is asked.

    Raises:
        RecipeError: the address is none, a number is out of range, or the variable of the key is not set.
    """
    url = _url(args["url"], f"{where}.url")
    for name in ("concurrency", "per_minute"):
        if args[name] is not None and args[name] < 1:
            raise RecipeError(f"{where}.{name}: {args[name]} - give at least 1")
    if not 0 < args["timeout"] < math.inf:
        raise RecipeError(f"{where}.timeout: {args['timeout']} - give seconds, more than 0")
    if args["retries"] < 0:
        raise RecipeError(f"{where}.retries: {args['retries']} - give 0 or more")
    variable = args["api_key_env"]
    secret = "" if variable is None else os.environ.get(variable, "").strip()
    if variable is not None and not secret:
        # Whoever puts the key itself here should not find it in a log.
        shown = repr(variable) if variable.isupper() and variable.isidentifier() else "what is given"
        raise RecipeError(
            f"{where}.api_key_env: {shown} is no environment variable that is set - export it, and give its name here"
        )
    if not (secret.isascii() and secret.isprintable()):
        raise RecipeError(f"{where}.api_key_env: {variable!r} holds signs that no key has - export it anew")
    numbers = {name: args[name] for name in ("timeout", "retries", "concurrency")}
    return Endpoint(url=url, api_key_env=variable, pace=pace_of(url, args["per_minute"]), **numbers)


def body_of(args: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What every request holds.

    Raises:
        RecipeError: a number is out of range, several votes would be one, or `extra_body` sets what is set otherwise.
    """
    temperature, most = args["temperature"], args["max_tokens"]
    if not args["model_name"]:
        raise RecipeError(f"{where}.model_name: empty - give the model's name at the endpoint")
    if temperature is not None and not 0 <= temperature < math.inf:
        raise RecipeError(f"{where}.temperature: {temperature} - give 0 or more")
    if most is not None and most < 1:
        raise RecipeError(f"{where}.max_tokens: {most} - give at least 1")
    if args["votes"] < 1:
        raise RecipeError(f"{where}.votes: {args['votes']} - give at least 1")
    if args["votes"] > 1 and temperature == 0:
        raise RecipeError(f"{where}.votes: {args['votes']} votes at temperature 0 are one vote - raise `temperature`")
    extra = args["extra_body"] if args["extra_body"] is not None else {}
    if not isinstance(extra, Mapping):
        raise RecipeError(f"{where}.extra_body: expected keys of the request, got {extra!r:.40}")
    for key in extra:
        if key in _SET_OTHERWISE:
            raise RecipeError(f"{where}.extra_body.{key}: cannot be set here - {_SET_OTHERWISE[key]}")
    if args["votes"] > 1 and "seed" in extra:
        raise RecipeError(f"{where}.extra_body.seed: {args['votes']} votes of one seed are one vote - remove it")
    try:
        json.dumps(extra, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}.extra_body: cannot be sent as JSON ({error}) - give plain values") from error
    sampling = {"temperature": temperature, "max_tokens": most}
    return {"model": args["model_name"], **{k: v for k, v in sampling.items() if v is not None}, **extra}


def _url(given: str, where: str) -> str:
    example = "give it like http://localhost:8000/v1"
    try:
        parts = urlsplit(given)
        is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        is_address = False
    # What stands before an @ may be a password.
    if not is_address or re.search(r"[^!-~]", given):
        raise RecipeError(f"{where}: {given.rpartition('@')[2]!r:.80} is no address - {example}")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise RecipeError(f"{where}: holds more than an address, perhaps a key - {example}, a key by `api_key_env`")
    path = parts.path.rstrip("/")
    if path.endswith("/chat/completions"):
        raise RecipeError(f"{where}: leave out /chat/completions - {example}")
    return f"{parts.scheme}://{parts.netloc}{path}"


def _criteria(given: Any, where: str) -> dict[str, Criterion]:
    if not isinstance(given, Mapping) or not given:
        raise RecipeError(
            f"{where}: expected criteria by name, as {{correct: {{text: Is it right?}}}}, got {given!r:.40}"
        )
    found: dict[str, Criterion] = {}
    for name, criterion in given.items():
        place = f"{where}.{name}"
        if not isinstance(criterion, Mapping):
            raise RecipeError(f"{place}: expected {{text: ..., weight: ...}}, got {criterion!r:.40}")
        for key in criterion:
            if key not in ("text", "weight"):
                raise RecipeError(
                    f"{place}.{key}: unknown key{hint_or_list(str(key), ('text', 'weight'), 'there are')}"
                )
        text, weight = criterion.get("text"), criterion.get("weight", 1.0)
        if not isinstance(text, str) or not text.strip():
            raise RecipeError(f"{place}.text: expected text, got {text!r:.40} - say what the judge is to look at")
        if not _is_number(weight) or weight <= 0:
            raise RecipeError(f"{place}.weight: {weight!r:.40} - give a number above 0, or leave the criterion out")
        found[str(name)] = Criterion(text.strip(), float(weight))
    return found


def _scale(given: Any, where: str) -> tuple[float, float]:
    if not isinstance(given, Sequence) or len(given) != 2 or not all(map(_is_number, given)):
        raise RecipeError(f"{where}: expected the worst and the best score, as [1, 5], got {given!r:.40}")
    low, high = given
    if low >= high:
        raise RecipeError(f"{where}: [{low:g}, {high:g}] - give the worst score first, and a better one after it")
    return float(low), float(high)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read(given: str, where: str, base: Path) -> str:
    path = base / Path(given).expanduser()
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise RecipeError(f"{where}: {path}: {error.strerror} - give the path of a text file") from error
    except ValueError as error:
        raise RecipeError(f"{where}: {path}: not UTF-8 - save it as UTF-8") from error
