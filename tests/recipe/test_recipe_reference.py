"""The reference in docs/recipes.md and the JSON Schema are what the specs say, and they say something of every key."""

from __future__ import annotations

import json

import pytest
import recipe_docs
import recipe_schema
import yaml
from peers import PEERS, TABLE, names_in
from recipe_keys import choices, inner, keys_of, own_keys, sections

from rlpost.cli.copy import schema_file
from rlpost.recipe.kinds import kinds, spec_of
from rlpost.section import Choice

SECTIONS = {section.__name__: section for section in sections()}


def test_the_reference_is_what_the_specs_say():
    assert recipe_docs.page() == recipe_docs.PAGE.read_text("utf-8"), "run `make reference`"


def test_the_schema_is_what_the_specs_say():
    assert recipe_schema.text() == schema_file().read_text("utf-8"), "run `make reference`"


@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
def test_every_key_and_every_choice_says_what_it_means(section):
    assert section.__doc__
    for key in keys_of(section):
        assert key.description, key.name
        for choice in (cls for cls in inner(key.type) if issubclass(cls, Choice)):
            assert all(choices(choice).values()), choice


def test_other_toolkits_names_are_for_keys_that_there_are():
    table = yaml.safe_load(TABLE.read_text("utf-8"))["sections"]
    for section, rows in table.items():
        assert rows.keys() <= {key.name for key in own_keys(SECTIONS[section])}, section
        assert all(len(cells) == len(PEERS) and any(map(names_in, cells)) for cells in rows.values()), section


def test_other_toolkits_names_of_arguments_are_for_arguments_that_there_are():
    table = yaml.safe_load(TABLE.read_text("utf-8"))["arguments"]
    for function, rows in table.items():
        assert rows.keys() <= recipe_schema.arguments_of(function), function


def definitions():
    return json.loads(schema_file().read_text("utf-8"))["$defs"]


def test_a_stage_without_a_kind_may_have_the_keys_of_every_kind():
    keys = {key.name for kind in kinds() for key in keys_of(spec_of(kind))}
    assert definitions()["kind"]["properties"].keys() == keys
    assert {"gamma", "modifiers", "teacher"} <= keys


@pytest.mark.parametrize("kind", kinds())
def test_a_stage_of_a_kind_may_have_its_keys_alone(kind):
    schema = definitions()[f"kind.{kind}"]
    assert schema["properties"].keys() == {key.name for key in keys_of(spec_of(kind))}
    assert schema["additionalProperties"] is False


def test_nothing_is_required_of_a_recipe_that_may_inherit():
    def required(schema):
        if isinstance(schema, dict):
            for name, value in schema.items():
                if name == "required":
                    yield value
                elif name not in ("if", "enum"):
                    yield from required(value)
        elif isinstance(schema, list):
            for value in schema:
                yield from required(value)

    assert list(required(definitions())) == []
