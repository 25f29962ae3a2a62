"""Normalise mathematics: Unicode and variants of LaTeX become plain LaTeX.

The contents of `\\text{}` and the like are put between ⟦ and ⟧, so that words are not taken for products of letters.
"""

from __future__ import annotations

import re
import unicodedata


class Unreadable(Exception):
    """A text is ambiguous or no answer; says why."""


_SIGNS = {
    "÷": "/", "⁄": "/", "∕": "/", "≠": "\\ne ", "≈": "\\approx ", "∞": "\\infty ", "∪": "\\cup ", "∩": "\\cap ",
    "∈": "\\in ", "±": "\\pm ", "∓": "\\mp ", "ℝ": "\\mathbb{R}", "∖": "\\setminus ", "…": "\\ldots ", "∣": "|",
    "∛": "\\sqrt[3]", "∜": "\\sqrt[4]", "⟦": " ", "⟧": " ", "∨": "\\lor ", "∧": "\\land ", "⌊": "\\lfloor ",
    "⌋": "\\rfloor ", "⌈": "\\lceil ", "⌉": "\\rceil ",
    **dict.fromkeys("−–‒﹣", "-"),
    **dict.fromkeys("×⋅·∙✕∗•", "*"),
    **dict.fromkeys("\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000", " "),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u2061\u2062\u2063", ""),
    **dict.fromkeys("≤⩽≦", "\\le "),
    **dict.fromkeys("≥⩾≧", "\\ge "),
    **dict.fromkeys("°º", "^\\circ "),
    **dict.fromkeys("∅⌀", "\\emptyset "),
    **dict.fromkeys("’‘′", "'"),
    **dict.fromkeys("“”", '"'),
    **dict.fromkeys("⟨〈", "\\langle "),
    **dict.fromkeys("⟩〉", "\\rangle "),
}  # fmt: skip
_GREEK = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "ζ": "zeta", "η": "eta", "θ": "theta",
    "ι": "iota", "κ": "kappa", "λ": "lambda", "μ": "mu", "ν": "nu", "ξ": "xi", "ρ": "rho", "σ": "sigma", "τ": "tau",
    "υ": "upsilon", "φ": "phi", "χ": "chi", "ψ": "psi", "ω": "omega", "π": "pi", "Γ": "Gamma", "Δ": "Delta",
    "Θ": "Theta", "Λ": "Lambda", "Σ": "Sigma", "Φ": "Phi", "Ψ": "Psi", "Ω": "Omega", "Π": "Pi", "ϕ": "phi",
    "ϵ": "epsilon", "ϑ": "theta",
}  # fmt: skip
GREEK = frozenset(_GREEK.values())
_SIGNS.update({letter: f"\\{name} " for letter, name in _GREEK.items()})
_TABLE = str.maketrans(_SIGNS)
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ", "0123456789+-ni", strict=True))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_RUN_RAISED = re.compile(f"[{''.join(_RAISED)}]+")
_RUN_LOWERED = re.compile(f"[{''.join(_LOWERED)}]+")
_ONE_FRACTION = re.compile("[¼-¾⅐-⅞↉]")
_WIDE = re.compile("[\uff01-\uff5e\U0001d400-\U0001d7ff]")
_ROOT = re.compile(r"([√∛∜])\s*(\d+(?:\.\d+)?|[A-Za-zα-ω])")
_DEGREES = {"√": "", "∛": "[3]", "∜": "[4]"}

_WORDS = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|texttt|mathrm|mathsf|mathit|rm|bf|mbox|hbox|operatorname)\*?\s*\{([^{}]*)\}"
)
_BOLD = re.compile(r"\\(?:mathbf|boldsymbol|bm|vec|hat|bar|overline|overrightarrow)\s*\{\s*(\\?[A-Za-z]+)\s*\}")
_EXPLICIT_GROUPS = re.compile(r"(?<=\d)(?:\{,\}|,?\\[,!]|\\[;: ]|~)\s*(?=\d{3}(?!\d))")
_SPACED_GROUPS = re.compile(r"(?<![\d.,/^_{}\\])[1-9]\d{0,2}(?: \d{3})+(?![\d/]| ?\\?[,./]\d)")
_SPACING = re.compile(
    r"\\(?:[,;:! ]|quad\b|qquad\b|thinspace\b|displaystyle\b|textstyle\b|limits\b|phantom\{[^{}]*\})|~"
)
_SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lrm]?|mleft|mright)(?![a-zA-Z])\.?\s*")
_ALIASES = (
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\[dt]binom(?![a-zA-Z])"), r"\\binom"),
    (re.compile(r"\\(?:leq|leqslant|leqq)(?![a-zA-Z])|<=|=<"), r"\\le "),
    (re.compile(r"\\(?:geq|geqslant|geqq)(?![a-zA-Z])|>="), r"\\ge "),
    (re.compile(r"\\(?:neq|not\s*=)(?![a-zA-Z])|!="), r"\\ne "),
    (re.compile(r"\\lt(?![a-zA-Z])"), "<"),
    (re.compile(r"\\gt(?![a-zA-Z])"), ">"),
    (re.compile(r"\\(?:times|cdot|ast|bullet)(?![a-zA-Z])"), "*"),
    (re.compile(r"\\div(?![a-zA-Z])"), "/"),
    (re.compile(r"\\(?:varnothing|empty|emptyset)(?![a-zA-Z])"), r"\\emptyset "),
    (re.compile(r"\\(?:infin|infty)(?![a-zA-Z])"), r"\\infty "),
    (re.compile(r"\\lbrace(?![a-zA-Z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![a-zA-Z])"), r"\\}"),
    (re.compile(r"\\lbrack(?![a-zA-Z])"), "["),
    (re.compile(r"\\rbrack(?![a-zA-Z])"), "]"),
    (re.compile(r"\\(?:[lr]?vert|mid)(?![a-zA-Z])"), "|"),
    (re.compile(r"\\(?:varphi)(?![a-zA-Z])"), r"\\phi"),
    (re.compile(r"\\(?:varepsilon)(?![a-zA-Z])"), r"\\epsilon"),
    (re.compile(r"\\mathbb\s*R|\\R(?![a-zA-Z])|\\Reals(?![a-zA-Z])"), r"\\mathbb{R}"),
    (re.compile(r"\\(?:lor|vee)(?![a-zA-Z])"), " ⟦or⟧ "),
    (re.compile(r"\\(?:land|wedge)(?![a-zA-Z])"), " ⟦and⟧ "),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\^\s*\{\s*\\circ\s*\}|\\degree(?![a-zA-Z])|\\textdegree(?![a-zA-Z])"), r"^\\circ "),
    (re.compile(r":="), "="),
    (re.compile(r"\\colon(?![a-zA-Z])"), ":"),
    (re.compile(r"\\dots(?![a-zA-Z])|\\cdots(?![a-zA-Z])|\.\.\.+"), r"\\ldots "),
)
_FUNCTION_NAMES = re.compile(r"⟦\s*(sin|cos|tan|cot|sec|csc|ln|log|exp|arcsin|arccos|arctan|sqrt)\s*⟧")
_LETTER_IN_TEXT = re.compile(r"(?<![⟦A-Za-z] )(?<=[\d)}\]+\-*/^ ])⟦([ei])⟧(?=\^)")
_MONEY = re.compile(r"\\?\$")


def normalise(text: str) -> str:
    """The text with one spelling per sign and command; runs of spaces become one."""
    text = _ONE_FRACTION.sub(_fraction, _WIDE.sub(lambda m: unicodedata.normalize("NFKC", m[0]), text))
    text = _ROOT.sub(lambda m: f"\\sqrt{_DEGREES[m[1]]}{{{m[2]}}}", text).replace("√", "\\sqrt ")
    text = _RUN_RAISED.sub(lambda m: f"^{{{''.join(_RAISED[c] for c in m[0])}}}", text)
    text = _RUN_LOWERED.sub(lambda m: f"_{{{''.join(_LOWERED[c] for c in m[0])}}}", text)
    text = _SIZES.sub("", text.translate(_TABLE))
    text = _EXPLICIT_GROUPS.sub("", text)
    if "{,}" in text:
        raise Unreadable("a comma in braces that groups no thousands")
    text = _SPACING.sub(" ", _keep_rows(text))
    for _ in range(3):  # \text inside \textbf
        text = _WORDS.sub(r"⟦\1⟧", text)
    text = _BOLD.sub(r"\\bold{\1}", text)
    text = _LETTER_IN_TEXT.sub(r"\1", _FUNCTION_NAMES.sub(r"\\\1 ", text))
    for pattern, spelling in _ALIASES:
        text = pattern.sub(spelling, text)
    text = " ".join(text.replace("\x00", "\\\\").split())
    return _SPACED_GROUPS.sub(lambda m: m[0].replace(" ", ""), text)


def without_dollars(text: str) -> str:
    """The text without the dollar signs and brackets that begin and end mathematics; dollars of money stay."""
    text = re.sub(r"(?<!\\)\\[()\[\]]", "", text).replace("$$", "$")
    signs = [m for m in _MONEY.finditer(text) if m[0] == "$"]
    drop: set[int] = set()
    i = 0
    while i < len(signs):
        here, after = signs[i].start(), signs[i + 1].start() if i + 1 < len(signs) else None
        if after is None:
            # A single one: money before a number, else a leftover.
            if not re.match(r"\$\s*[\d.]", text[here:]):
                drop.add(here)
            i += 1
        elif re.match(r"\$-?[\d.]", text[after:]) and not text[after - 1 : after].strip():
            i += 1  # the next one stands before a number, after a space: "$5 and $6" are sums of money
        else:
            drop |= {here, after}
            i += 2
    return "".join(sign for at, sign in enumerate(text) if at not in drop)


def _keep_rows(text: str) -> str:
    """Replace `\\\\`, the end of a matrix row, so that it is not read as the start of a command."""
    return re.sub(r"\\\\(?:\[[^\]]*\])?", "\x00", text)


def _fraction(match: re.Match[str]) -> str:
    above, _, below = unicodedata.normalize("NFKC", match[0]).partition("\u2044")
    return f"\\frac{{{above}}}{{{below}}}"
