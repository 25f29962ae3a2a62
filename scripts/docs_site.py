"""Builds the documentation site into site/ from docs/, with llms.txt, and checks every link: `make docs`.

The pages are written for where they are mostly read, beside the code. What the site's Markdown reads otherwise is
rewritten in copies: blocks of code that name a file, lists without a blank line before them, and headings' anchors.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CONFIG = ROOT / "zensical.toml"
FENCE = re.compile(r"^(\s*)(```+)(\w+)(?: +(\S.*))?$")
ITEM = re.compile(r"^ {0,3}(?:[-*]|\d+\.) ")
TABLE = re.compile(r"^\s*\|")
PLACES = re.compile(r"(`[^`]*`|\]\([^)]*\))")
"""Code, and where a link leads."""


def main() -> None:
    config = tomllib.loads(CONFIG.read_text("utf-8"))["project"]
    source, site = ROOT / config["docs_dir"], ROOT / config["site_dir"]
    shutil.rmtree(source, ignore_errors=True)
    shutil.rmtree(site, ignore_errors=True)
    shutil.copytree(DOCS, source)
    for page in source.rglob("*.md"):
        page.write_text(rewritten(page.read_text("utf-8")), "utf-8")
    program = Path(sys.executable).with_name("zensical")
    subprocess.run([program, "build", "--clean", "--config-file", CONFIG], cwd=ROOT, check=True)
    for page in DOCS.rglob("*.md"):  # as they are, for programs that read
        shutil.copy(page, site / page.relative_to(DOCS))
    (site / "llms.txt").write_text(llms(config), "utf-8")
    wrong = broken_links(site)
    print("\n".join(wrong) or f"{site}: {len(list(site.rglob('*.html')))} pages, every link leads somewhere")
    sys.exit(bool(wrong))


def rewritten(text: str) -> str:
    """A page in the Markdown of the site."""
    lines: list[str] = []
    closing = ""
    for line in text.splitlines():
        before = lines[-1] if lines else ""
        if closing:
            closing = "" if line.strip() == closing else closing
        elif line.lstrip().startswith("```"):
            closing = re.match(r"\s*(`+)", line)[1]  # type: ignore[index]
            if named := FENCE.match(line):
                line = f"{named[1]}{named[2]}{named[3]}"
        elif before.strip() and (
            (ITEM.match(line) and not ITEM.match(before) and not before.startswith(" "))
            or (TABLE.match(line) and not TABLE.match(before))
        ):
            lines.append("")
        if not closing and (heading := re.match(r"^(#+) (.+)$", line)):
            line = f"{line} {{ #{anchor(heading[2])} }}"
        elif not closing and not line.startswith("    "):
            line = formulas(line)
        lines.append(line)
    return "\n".join(lines) + "\n"


def formulas(line: str) -> str:
    """Indices and exponents, outside of code and links: `x_{k}` and `r_k` lowered, `e^{x}` and `e^(x)` raised."""
    if line.count("`") % 2:  # code that goes on in the next line
        return line
    parts = PLACES.split(line)
    for i in range(0, len(parts), 2):
        indexed = re.sub(r"(\b[^\W_]+|\))_([a-z])(?!\w)", r"\1<sub>\2</sub>", parts[i])
        indexed = re.sub(r"_\{([^{}]*)\}", r"<sub>\1</sub>", indexed)
        parts[i] = re.sub(
            r"\^(?:\{([^{}]*)\}|(\([^()]*(?:\([^()]*\)[^()]*)*\))|(\w))",
            lambda m: f"<sup>{m[1] or m[2] or m[3]}</sup>",
            indexed,
        )
    return "".join(parts)


def anchor(heading: str) -> str:
    """The anchor of a heading where the code is hosted; links between pages use it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def pages(nav: list[Any]) -> Iterator[tuple[str, str, str]]:
    """(section, title, file) of every page of the navigation."""
    for entry in nav:
        for title, below in entry.items():
            if isinstance(below, str):
                yield "", title, below
            else:
                yield from ((title, name, file) for _, name, file in pages(below))


def llms(config: dict[str, Any]) -> str:
    """llms.txt (llmstxt.org): the pages by section, each with its first sentence."""
    lines = [f"# {config['site_name']}", "", f"> {config['site_description']}"]
    section = None
    for part, title, file in pages(config["nav"]):
        if part != section:
            lines += ["", f"## {part or 'Start'}", ""]
            section = part
        lines.append(f"- [{title}]({file}): {first_sentence((DOCS / file).read_text('utf-8'))}")
    return "\n".join(lines) + "\n"


def first_sentence(text: str) -> str:
    """Of a page: what stands below its title, as plain text."""
    paragraphs = re.split(r"\n\s*\n", re.sub(r"(?ms)^```.*?^```$", "", text))
    prose = next((p for p in paragraphs[1:] if re.match(r"[\w`*\[]", p)), paragraphs[0])
    plain = re.sub(r"\[([^\]]+)\]\([^)]*\)|[*]+", lambda m: m[1] or "", " ".join(prose.split()))
    return re.split(r"(?<=[.:])\s+(?=[A-Z`\[])|(?<=:)$", plain)[0].rstrip(":").rstrip(".") + "."


class Page(HTMLParser):
    """The links and anchors of a page of the site."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, _tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the element's name and where it leads."""
        given = dict(attrs)
        self.anchors |= {name for name in (given.get("id"), given.get("name")) if name}
        self.links |= {link for link in (given.get("href"), given.get("src")) if link}


def broken_links(site: Path) -> list[str]:
    """A line for every link within the site that leads nowhere, and for what is loaded from elsewhere."""
    read = {file.resolve(): Page(file.read_text("utf-8")) for file in site.rglob("*.html")}
    wrong = []
    for file, page in read.items():
        if file.name == "404.html":  # served from anywhere, so its links are absolute
            continue
        for link in sorted(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            fragment = unquote(parts.fragment)
            if not target.exists() or (fragment and target in read and fragment not in read[target].anchors):
                wrong.append(f"{file.relative_to(site.resolve())}: {link} leads nowhere")
    return wrong


if __name__ == "__main__":
    main()
