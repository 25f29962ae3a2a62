"""The site of the documentation: its pages, how they are rewritten, and the check of its links."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import docs_site
from docs_site import DOCS, anchor, broken_links, first_sentence, formulas, llms, pages, rewritten

from rlpost.recipe.files import packaged

CONFIG = tomllib.loads(docs_site.CONFIG.read_text("utf-8"))["project"]


def test_every_page_is_in_the_navigation_once() -> None:
    named = sorted(file for _, _, file in pages(CONFIG["nav"]))
    decisions = {"adr/README.md"}
    assert named == sorted({page.name for page in DOCS.glob("*.md")} | decisions), "see nav in zensical.toml"


def test_links_of_pages_stay_among_them() -> None:
    for page in DOCS.rglob("*.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text("utf-8")):
            assert (page.parent / target).resolve().is_relative_to(DOCS), f"{page.name}: {target} is not on the site"


def test_what_the_site_reads_otherwise_is_rewritten() -> None:
    text = (
        "# A & b: `c`\n\nGiven:\n- one\n- two\n```python file.py\n# not a heading\n- no item\n```\ntext\n| a |\n|---|\n"
    )
    assert rewritten(text).splitlines() == [
        "# A & b: `c` { #a--b-c }",
        *["", "Given:", "", "- one", "- two", "```python", "# not a heading", "- no item", "```", "text", ""],
        *["| a |", "|---|"],
    ]
    assert anchor("KL to the reference") == "kl-to-the-reference"


def test_formulas_have_indices_and_exponents() -> None:
    assert formulas("Σ_{k≥t} γ^{k−t} r_k") == "Σ<sub>k≥t</sub> γ<sup>k−t</sup> r<sub>k</sub>"
    assert formulas("e^{s_i} + e^(−(a)/β)·x^2") == "e<sup>s<sub>i</sub></sup> + e<sup>(−(a)/β)</sup>·x<sup>2</sup>"
    for kept in ("`x^2` and `r_k`", "[x](a_b.md#c_d)", "pass_at_k of logp_N", "`r_k and"):
        assert formulas(kept) == kept


def test_llms_txt_names_every_page_with_a_sentence() -> None:
    lines = llms(CONFIG).splitlines()
    assert lines[:3] == ["# rlpost", "", f"> {CONFIG['site_description']}"]
    entries = [re.fullmatch(r"- \[(.+)\]\((.+\.md)\): (.+)\.", line) for line in lines if line.startswith("- ")]
    assert [entry and entry[2] for entry in entries] == [file for _, _, file in pages(CONFIG["nav"])]
    assert lines.count("## Guides") == 1
    assert first_sentence("# T\n\n```\nx\n```\n\nA [b](c.md) `d: e` stands. More.") == "A b `d: e` stands."


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<h1 id="top">A</h1><a href="b.html#x">b</a><a href="#top">t</a>')
    (tmp_path / "b.html").write_text('<h1 id="y">B</h1><a href="c.html">c</a><img src="https://x.org/p.png">')
    assert sorted(broken_links(tmp_path)) == [
        "a.html: b.html#x leads nowhere",
        "b.html: c.html leads nowhere",
    ]


def test_what_the_guides_name_exists() -> None:
    told = "".join((DOCS / f"{name}.md").read_text("utf-8") for name in ("recipes", "objectives", "runs"))
    known = {*re.findall(r"\w+", told), *packaged()}
    words = re.findall(r"`([\w./]+)`", (DOCS / "guides.md").read_text("utf-8"))
    assert [word for word in words if word not in known and not set(re.findall(r"\w+", word)) <= known] == []


def test_the_guides_name_every_recipe_of_a_method() -> None:
    page = (DOCS / "guides.md").read_text("utf-8")
    shared = {"methods/common", "methods/on_pairs", "methods/on_policy"}
    methods = {name for name in packaged() if name.startswith("methods/")} - shared
    assert [name for name in sorted(methods) if f"`{name}`" not in page] == []
