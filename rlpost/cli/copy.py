"""`rlpost copy`."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from rlpost.cli.arguments import home
from rlpost.cli.as_text import print_result
from rlpost.cli.completion import recipes
from rlpost.errors import DiskError, RecipeError


def schema_file() -> Path:
    """The packaged JSON Schema of recipes."""
    return Path(str(files("rlpost"))) / "recipe/schema.json"


def copy(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A packaged recipe's name.", autocompletion=recipes)],
    file: Annotated[
        str | None, typer.Argument(metavar="FILE", help="The .yaml file to write, or its folder.", callback=home)
    ] = None,
) -> None:
    """Copy a packaged recipe, to change it.

    Editors that know YAML check it as you type. Prints the file.
    """
    from rlpost.recipe.files import find, packaged

    if recipe not in packaged() and find(recipe):
        raise RecipeError(f"{recipe}: is a file of yours already - `cp` copies it")
    name = f"{recipe.rpartition('/')[2]}.yaml"
    target = Path(file or name)
    if target.is_dir():
        target /= name
    if target.suffix not in (".yaml", ".yml"):
        raise RecipeError(f"{target}: a recipe's file ends in .yaml - give {target}.yaml")
    try:
        with target.open("x", encoding="utf-8") as opened:
            opened.write(copied(recipe, str(target)))
    except FileExistsError as error:
        raise RecipeError(f"{target}: is there already - give another FILE, or remove it") from error
    except OSError as error:
        raise DiskError(f"{target}: {error.strerror} - give another FILE") from error
    print_result(target)


def copied(recipe: str, target: str) -> str:
    """The text to write to the file `target`: a packaged recipe below a line that tells editors its schema.

    Inherited recipes get their packaged names, which hold in any folder.
    """
    from rlpost.recipe.files import find

    text = find(recipe).read_text("utf-8")
    text = re.sub(rf"(?m)^(#.*\brlpost train ){re.escape(recipe)}(?![\w./-])", rf"\g<1>{target}", text, count=1)
    text = re.sub(r"(?m)^defaults: *\[(.*)\]", lambda match: f"defaults: [{_from_anywhere(recipe, match[1])}]", text)
    schema = schema_file()
    shown = schema.as_uri() if re.search(r"\s", str(schema)) else schema
    return f"# yaml-language-server: $schema={shown}\n{text}"


def _from_anywhere(recipe: str, entries: str) -> str:
    """The entries of `defaults`, with those of the recipe's folder under their packaged names."""
    from rlpost.recipe.files import packaged

    folder, names = recipe.rpartition("/")[0], packaged()
    full = {name: f"{folder}/{name}" for name in map(str.strip, entries.split(",")) if f"{folder}/{name}" in names}
    return ", ".join(full.get(name, name) for name in map(str.strip, entries.split(",")))
