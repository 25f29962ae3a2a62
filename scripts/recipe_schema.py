"""The JSON Schema of a recipe, for editors: keys and choices with their descriptions, typos flagged as they are made.

    python scripts/recipe_schema.py    # writes rlpost/recipe/schema.json

It is looser than the check of a recipe that is run. A recipe may inherit, so nothing is required, and a stage without
`kind` may have the keys of every kind. Any value may be a reference (`${...}`) or still missing (`???`). Kinds,
functions and engines of a user's file are taken as they come.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

from recipe_keys import Key, choices, keys_of, sections, summary, write

from rlpost.data.params import TASK
from rlpost.engine.params import LOCAL, EngineChoice
from rlpost.recipe.files import GROUPS
from rlpost.recipe.kinds import kinds, spec_of
from rlpost.recipe.schema import Recipe
from rlpost.recipe.specs.common import Stage
from rlpost.rewards.params import REWARD
from rlpost.rewards.tree import NODES, SHAPING
from rlpost.section import Choice, Local, Section
from rlpost.usercode.binding import offered, settable
from rlpost.usercode.gym import GYM
from rlpost.usercode.params import Function, Lookup

ROOT = Path(__file__).parents[1]
FILE = ROOT / "rlpost" / "recipe" / "schema.json"
Schema = dict[str, Any]

REFERENCE: Schema = {"type": "string", "pattern": r"\$\{|^\?\?\?$"}
OF_FILE: Schema = {"type": "string", "pattern": r"\.py:[A-Za-z_]\w*$|\$\{|^\?\?\?$"}
LIMITS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}
PLAIN = {int: "integer", float: "number", bool: "boolean", str: "string"}
DEFAULTS: Schema = {
    "type": "array",
    "items": {
        "type": ["string", "object"],
        "properties": {group: {"type": "string"} for group in GROUPS},
        "additionalProperties": False,
    },
}
DEFAULTS_TEXT = (
    "Recipes to inherit from, by name: in the same folder first, then among the packaged ones. `{model: NAME}` chooses "
    "the section of the file `model/NAME.yaml`. Later entries win; `_self_` is the file itself, and comes last when it "
    "is not listed."
)


def build() -> Schema:
    """The whole schema."""
    definitions: Schema = {"reference": REFERENCE}
    for section in sections():
        if not issubclass(section, Stage | Function) and section is not Recipe:
            definitions[section.__name__] = _section(section, definitions)
    stages = {kind: _section(spec_of(kind), definitions) for kind in kinds()}
    definitions |= {f"kind.{kind}": schema for kind, schema in stages.items()}
    definitions["kind"] = _union(stages, definitions)
    definitions["Stage"] = _stage()
    whole = _section(Recipe, definitions)
    whole["properties"] = {"defaults": _described(DEFAULTS, DEFAULTS_TEXT), **whole["properties"]}
    by_name = {"type": "object", "additionalProperties": _or_reference({"$ref": "#/$defs/Stage"})}
    definitions["Recipe.stages"] = _described(by_name, definitions["Recipe.stages"]["description"])
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A recipe of rlpost",
        **whole,
        "$defs": definitions,
    }


def text() -> str:
    """The schema as the file has it: a line for each definition."""
    whole = build()
    definitions = whole.pop("$defs")
    lines = [f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in definitions.items()]
    head = json.dumps(whole, indent=1, ensure_ascii=False).removesuffix("\n}")
    return head + ',\n "$defs": {\n  ' + ",\n  ".join(lines) + "\n }\n}\n"


def _section(section: type[Section], definitions: Schema) -> Schema:
    kind = {"kind": {}} if issubclass(section, Stage) else {}  # what it may be, says "Stage"
    return {
        "type": "object",
        **_text(summary(section)),
        "additionalProperties": False,
        "properties": {key.name: _named(section, key, definitions) for key in keys_of(section)} | kind,
    }


def _named(section: type[Section], key: Key, definitions: Schema) -> Schema:
    """A reference to a key's schema, which stands once, in the section that defines the key."""
    owner = next(cls for cls in section.__mro__ if key.name in inspect.get_annotations(cls))
    name = f"{owner.__name__}.{key.name}"
    if name not in definitions:
        definitions[name] = _key(section, key, definitions)
    return {"$ref": f"#/$defs/{name}"}


def _key(section: type[Section], key: Key, definitions: Schema) -> Schema:
    lookup = key.marked(Lookup)
    if lookup is not None:
        value = _function(key.type, lookup, definitions)
    elif section is EngineChoice and key.name == "engine":
        value = {"anyOf": [{"enum": [LOCAL]}, OF_FILE]}
    else:
        value = _value(key.type, {name: key.bound(bound) for bound, name in LIMITS.items()})
    value = {"anyOf": [value, {"type": "null"}]} if key.optional else value
    path = {"format": "path"} if key.marked(Local) else {}
    return _described({**_or_reference(value), **path}, key.description + _default(key))


def _default(key: Key) -> str:
    """A sentence about what is the case without the key; that nothing is, goes without saying."""
    if key.required or key.default in (None, "", [], {}):
        return ""
    plain = isinstance(key.default, str) and key.default.isidentifier()
    return f" Default: `{key.default if plain else json.dumps(key.default, ensure_ascii=False)}`."


def _value(annotation: Any, limits: Mapping[str, float | None]) -> Schema:
    """What a value of that type looks like.

    Raises:
        TypeError: it is none that a recipe's keys have.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    given = {name: limit for name, limit in limits.items() if limit is not None}
    if annotation is Any:
        return {}
    if annotation in PLAIN:
        return {"type": PLAIN[annotation], **given}
    if origin is list:
        return {"type": "array", "items": _or_reference(_value(arguments[0], limits))}
    if origin is tuple:
        n = len(arguments)
        return {"type": "array", "items": _or_reference(_value(arguments[0], limits)), "minItems": n, "maxItems": n}
    if origin is dict:
        return {"type": "object", "additionalProperties": _or_reference(_value(arguments[1], limits))}
    if isinstance(annotation, type) and issubclass(annotation, Choice):
        return _choices(choices(annotation))
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return {"$ref": f"#/$defs/{annotation.__name__}"}
    raise TypeError(f"no schema for {annotation}")


def _choices(options: Mapping[str, str]) -> Schema:
    texts = list(options.values())
    return {"enum": list(options), **({"markdownEnumDescriptions": texts} if any(texts) else {})}


def _or_reference(value: Schema) -> Schema:
    """The same, or a reference to it; text may be one anyway."""
    reference = {"$ref": "#/$defs/reference"}
    if value in ({}, {"type": "string"}):
        return value
    if "anyOf" in value:
        taken = OF_FILE in value["anyOf"] or {"type": "string"} in value["anyOf"]
        return value if taken else {"anyOf": [*value["anyOf"], reference]}
    return {"anyOf": [value, reference]}


def _described(value: Schema, description: str) -> Schema:
    return {**value, **_text(description)}


def _text(description: str) -> Schema:
    """A description, as editors show it: with its code in it, if there is some."""
    markdown = {"markdownDescription": description} if "`" in description else {}
    return {"description": description, **markdown}


def _function(annotation: Any, lookup: Lookup, definitions: Schema) -> Schema:
    """A key that names a function, or a list of them: names as choices, with each function's own arguments."""
    several = get_origin(annotation) is list
    section = get_args(annotation)[0] if several else annotation
    name = f"function.{lookup.name}"
    reference: Schema = {"$ref": f"#/$defs/{name}"}
    if name not in definitions:
        definitions[name] = {}  # rewards are below rewards
        functions = {fn: (signature, _about(module, fn)) for fn, module, signature in offered(lookup)}
        schema = _section(section, definitions)
        names = {fn: about for fn, (_, about) in functions.items()}
        names |= _nodes() if lookup is REWARD else {}
        described = definitions["Function.fn"]["description"]
        # Names of an optional package's tasks: not listed, for the schema is the same wherever it is written.
        of_package: list[Schema] = [{"type": "string", "pattern": rf"^{GYM}\.\w+$"}] if lookup is TASK else []
        schema["properties"]["fn"] = _described({"anyOf": [_choices(names), OF_FILE, *of_package]}, described)
        schema["allOf"] = [_arguments(fn, signature, lookup) for fn, (signature, _) in functions.items()]
        definitions[name] = schema
    return {"type": "array", "items": _or_reference(reference)} if several else reference


def _nodes() -> dict[str, str]:
    """The nodes of a tree of rewards, which put those in `of` together."""
    found = {name: summary(function) for name, function in NODES.items()}
    return {**found, SHAPING: "Of one child, a reward by step taken for a potential Φ: γΦ(s′) − Φ(s) for every step."}


def arguments_of(function: str) -> set[str]:
    """The arguments that recipes may give a function of rlpost, whichever key names it."""
    lookups = {key.marked(Lookup) for section in sections() for key in keys_of(section)} - {None}
    found = [(signature, lookup) for lookup in lookups for fn, _, signature in offered(lookup) if fn == function]
    return {name for signature, lookup in found for name in settable(signature, lookup)}


def _arguments(fn: str, signature: inspect.Signature, lookup: Lookup) -> Schema:
    """Where that function is named, its arguments."""
    parameters = settable(signature, lookup)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    arguments = {
        "type": "object",
        "properties": {p.name: _or_reference(_argument(str(p.annotation))) for p in parameters.values()},
        "additionalProperties": open_ended,
    }
    return {
        "if": {"required": ["fn"], "properties": {"fn": {"const": fn}}},
        "then": {"properties": {"args": _or_reference(arguments)}},
    }


def _argument(annotation: str) -> Schema:
    """As far as a plain annotation says what the values are."""
    if options := re.fullmatch(r"Literal\[(.*)\]", annotation):
        return {"enum": list(ast.literal_eval(f"({options[1]},)"))}
    bare = annotation.removesuffix(" | None")
    plain = {cls.__name__: name for cls, name in PLAIN.items()}
    if bare not in plain:
        return {}
    return {"type": plain[bare] if bare == annotation else [plain[bare], "null"]}


@cache
def _functions(module: str) -> dict[str, str]:
    file = ROOT.joinpath(*module.split("."))
    tree = ast.parse((file / "__init__.py" if file.is_dir() else file.with_suffix(".py")).read_text("utf-8"))
    found: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("rlpost."):
            found |= _functions(str(node.module))
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")
    return found


def _about(module: str, fn: str) -> str:
    """The first paragraph of a function's docstring."""
    return _functions(module).get(fn.rpartition(".")[2], "")


def _union(stages: Mapping[str, Schema], definitions: Schema) -> Schema:
    """A stage whose kind another recipe says: the keys of every kind."""
    found: dict[str, dict[str, list[str]]] = {"kind": {}}
    for kind, stage in stages.items():
        for name, value in stage["properties"].items():
            if value:
                found.setdefault(name, {}).setdefault(value["$ref"], []).append(kind)
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {name: _any_of(named, definitions) if named else {} for name, named in found.items()},
    }


def _any_of(kinds_by_reference: Mapping[str, list[str]], definitions: Schema) -> Schema:
    """A key that several kinds have: what any of them takes, and what it means in which."""
    if len(kinds_by_reference) == 1:
        return {"$ref": next(iter(kinds_by_reference))}
    options: list[Schema] = []
    texts: dict[str, list[str]] = {}
    for reference, named in kinds_by_reference.items():
        value = dict(definitions[reference.removeprefix("#/$defs/")])
        texts.setdefault(value.pop("description"), []).extend(named)
        value.pop("markdownDescription", None)
        options += [option for option in value.get("anyOf", [value]) if option not in options]
    several = [f"`{'`, `'.join(named)}`: {said}" for said, named in texts.items()]
    described = next(iter(texts)) if len(texts) == 1 else "\n\n".join(several)
    return _described(options[0] if len(options) == 1 else {"anyOf": options}, described)


def _stage() -> Schema:
    names = {kind: summary(spec_of(kind)) for kind in kinds()}
    kind = {"anyOf": [_choices(names), OF_FILE]}
    described = next(key.description for key in keys_of(Stage) if key.name == "kind")
    of_kinds = [
        {
            "if": {"required": ["kind"], "properties": {"kind": {"const": name}}},
            "then": {"$ref": f"#/$defs/kind.{name}"},
        }
        for name in names
    ]
    inherited = {"if": {"not": {"required": ["kind"]}}, "then": {"$ref": "#/$defs/kind"}}
    return {
        "type": "object",
        "properties": {"kind": _described(kind, described)},
        "allOf": [*of_kinds, inherited],
    }


if __name__ == "__main__":
    write(FILE, text())
