"""docs/api.md: signatures and docstrings of what `rlpost` and `rlpost.objectives` offer to Python.

    python scripts/api_docs.py    # writes it

Read from the sources, nothing is imported; what a docstring says is written once, where the code is.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"
WIDTH = 100
"""A longer signature has a line for each parameter."""
SECTIONS = {"Args": "Arguments", "Returns": "Returns", "Yields": "Yields", "Raises": "Raises"}
"""Of docstrings -> how the page calls them."""
INTRODUCTION = """# API reference

What `import rlpost` and `import rlpost.objectives` offer: signatures and docstrings, as they stand in the code.

<!-- Written by scripts/api_docs.py: change the docstrings instead, and run `make reference`. -->

How the parts of `rlpost` work together is told in [from Python](python.md); formulas, papers and what is exact about
them in [objectives](objectives.md). A letter at the end of a tensor's name is an axis: `reward_PG` is [P, G].
"""
ORDER = ("train", "load", "Generator", "Completion", "Run", "Score", "RlpostError")
"""Of the names of `rlpost`."""
Definition = ast.FunctionDef | ast.ClassDef


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION, "## rlpost\n"]
    places = package_places()
    for name in ORDER:
        parts.append("\n".join(entry(definition(places[name], name), "rlpost")))
    parts.append("\n".join(errors()))
    for module, names in objectives().items():
        tree = parsed(module)
        parts.append(f"## Objectives: {module.stem.replace('_', ' ')}\n\n{prose(ast.get_docstring(tree) or '')}\n")
        parts += ["\n".join(entry(definition(module, name), "rlpost.objectives")) for name in names]
    return "\n".join(parts)


def package_places() -> dict[str, Path]:
    """Name -> file, of what `import rlpost` offers."""
    (checked,) = (node for node in parsed(ROOT / "rlpost/__init__.py").body if isinstance(node, ast.If))
    found = {}
    for node in checked.body:
        assert isinstance(node, ast.ImportFrom)
        assert node.module is not None
        found |= {alias.name: file_of(node.module) for alias in node.names}
    return found


def objectives() -> dict[Path, list[str]]:
    """File -> the names that `rlpost.objectives` takes from it, in the order of the file."""
    found: dict[Path, list[str]] = {}
    for node in parsed(ROOT / "rlpost/objectives/__init__.py").body:
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names = {alias.name for alias in node.names}
            file = file_of(node.module)
            found[file] = [d.name for d in parsed(file).body if isinstance(d, Definition) and d.name in names]
            assert len(found[file]) == len(names), f"{file}: {names - set(found[file])}"
    return found


def file_of(module: str) -> Path:
    """The file of a module."""
    return ROOT / f"{module.replace('.', '/')}.py"


def parsed(file: Path) -> ast.Module:
    """The file's syntax tree."""
    return ast.parse(file.read_text("utf-8"))


def definition(file: Path, name: str) -> Definition:
    """The class or function of that name."""
    return next(node for node in parsed(file).body if isinstance(node, Definition) and node.name == name)


def entry(node: Definition, package: str) -> Iterator[str]:
    """A function or class: heading, signature, docstring, and of a class its fields and methods."""
    yield f"### {node.name}"
    yield ""
    if isinstance(node, ast.ClassDef):
        yield from class_entry(node, package)
    else:
        yield from function_entry(node, f"{package}.{node.name}")


def class_entry(node: ast.ClassDef, package: str) -> Iterator[str]:
    made = next((n for n in methods(node) if n.name == "__init__"), None)
    if made is not None:
        yield from block(signature(made, f"{package}.{node.name}"))
    else:
        bases = f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else ""
        yield from block(f"class {package}.{node.name}{bases}")
    yield from told(ast.get_docstring(node) or "")
    if made is not None:
        yield from told(ast.get_docstring(made) or "")
    rows = [*fields(node), *((n.name, ast.unparse(n.returns) if n.returns else "", n) for n in properties(node))]
    if rows:
        yield "**Fields**"
        yield ""
        yield from (f"- `{name}: {kind}`{note(text)}" for name, kind, text in rows)
        yield ""
    for method in methods(node):
        if not method.name.startswith("_") and method not in properties(node) and not marked(method, "overload"):
            yield f"#### {node.name}.{method.name}"
            yield ""
            yield from function_entry(method, f"{node.name}.{method.name}")


def function_entry(node: ast.FunctionDef, name: str) -> Iterator[str]:
    yield from block(signature(node, name))
    yield from told(ast.get_docstring(node) or "")


def signature(node: ast.FunctionDef, name: str) -> str:
    """As it is called; `self` is left out."""
    given = node.args
    plain = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(plain) - len(given.defaults)) + list(given.defaults)
    parts = [written(a, d) for a, d in zip(plain, defaults, strict=True) if a.arg not in ("self", "cls")]
    if given.vararg is not None:
        parts.append(f"*{written(given.vararg, None)}")
    elif given.kwonlyargs:
        parts.append("*")
    parts += [written(a, d) for a, d in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    if given.kwarg is not None:
        parts.append(f"**{written(given.kwarg, None)}")
    end = f" -> {ast.unparse(node.returns)}" if node.returns is not None and node.name != "__init__" else ""
    line = f"{name}({', '.join(parts)}){end}"
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){end}"])


def written(argument: ast.arg, default: ast.expr | None) -> str:
    text = argument.arg + (f": {ast.unparse(argument.annotation)}" if argument.annotation is not None else "")
    if default is None:
        return text
    return f"{text} = {ast.unparse(default)}" if argument.annotation is not None else f"{text}={ast.unparse(default)}"


def methods(node: ast.ClassDef) -> list[ast.FunctionDef]:
    return [n for n in node.body if isinstance(n, ast.FunctionDef)]


def properties(node: ast.ClassDef) -> list[ast.FunctionDef]:
    return [n for n in methods(node) if marked(n, "property") and not n.name.startswith("_")]


def marked(node: ast.FunctionDef, decorator: str) -> bool:
    return any(isinstance(d, ast.Name) and d.id == decorator for d in node.decorator_list)


def fields(node: ast.ClassDef) -> Iterator[tuple[str, str, str]]:
    """(name, type, the docstring below it) of each public field."""
    for line, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.target.id[0] != "_":
            text = after.value.value if is_text(after) else ""  # type: ignore[union-attr, attr-defined]
            yield line.target.id, ast.unparse(line.annotation), text


def is_text(node: ast.stmt | None) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def note(text: str | ast.FunctionDef) -> str:
    """What is said of a field or property, in one line."""
    if isinstance(text, ast.FunctionDef):
        text = ast.get_docstring(text) or ""
    parts = sections(text)
    said = " ".join(parts[""].split())
    for line in lines_of(parts.get("Raises", "")):
        said += f" Raises {coded(line)}"
    return f": {plain(said)}" if said else ""


def told(docstring: str) -> Iterator[str]:
    """A docstring as Markdown: prose, then lists."""
    parts = sections(docstring)
    if parts[""]:
        yield prose(parts[""])
        yield ""
    for section, title in SECTIONS.items():
        text = parts.get(section, "")
        if section in ("Returns", "Yields") and text:
            yield f"**{title}** {plain(' '.join(text.split()))}"
            yield ""
        elif text:
            yield f"**{title}**"
            yield ""
            yield from (f"- {plain(coded(line))}" for line in lines_of(text))
            yield ""


def sections(docstring: str) -> dict[str, str]:
    """Title -> text of a docstring's sections; what stands before them at ''."""
    found, title = {"": ""}, ""
    for line in inspect.cleandoc(docstring).splitlines():
        if line.rstrip(":") in SECTIONS and line.endswith(":"):
            title = line[:-1]
            found[title] = ""
        else:
            if title and line and not line.startswith(" "):  # prose after a section
                title = ""
            found[title] += f"{line}\n"
    return {name: text.strip("\n") for name, text in found.items()}


def lines_of(text: str) -> Iterator[str]:
    """The entries of a section, each in one line."""
    entries: list[str] = []
    for line in textwrap.dedent(text).splitlines():
        if line.startswith(" ") and entries:
            entries[-1] += f" {line.strip()}"
        elif line.strip():
            entries.append(line.strip())
    yield from entries


def coded(line: str) -> str:
    """`name: text` with the name as code."""
    named = re.sub(r"^(\**\w+(?:, \w+)*):", r"`\1`:", line)
    return re.sub(r"(?<!`)\b(\w+Error):", r"`\1`:", named)


def prose(text: str) -> str:
    """Paragraphs, lists and indented blocks of a docstring."""
    paragraphs = re.split(r"\n\s*\n", text)
    return "\n\n".join(p if p.startswith("    ") else plain(p) for p in paragraphs)


def plain(text: str) -> str:
    """Text whose signs mean themselves in Markdown, outside of code."""
    parts = re.split(r"(`[^`]+`)", text.replace("``", "`"))
    for i in range(0, len(parts), 2):
        escaped = parts[i].replace("<", "&lt;").replace("](", "] (")
        parts[i] = re.sub(r"(\*\w+\*)|\*", lambda m: m[1] or r"\*", escaped)  # *emphasis* stays
    return "".join(parts)


def block(code: str) -> list[str]:
    return ["```python", code, "```", ""]


def errors() -> Iterator[str]:
    """The kinds of RlpostError."""
    yield "Its kinds, from `rlpost.errors`:"
    yield ""
    for node in parsed(ROOT / "rlpost/errors.py").body:
        if isinstance(node, ast.ClassDef) and node.name != "RlpostError":
            yield f"- `{node.name}`: {plain(' '.join((ast.get_docstring(node) or '').split()))}"
    yield ""


def main() -> None:
    PAGE.write_text(page(), "utf-8")


if __name__ == "__main__":
    main()
