"""Parse expressions of numbers, letters and functions into trees.

A tree is a tuple: `("num", Fraction)`, `("name", "x")`, `("pi",)`, `("e",)`, `("i",)`, `("inf",)`, `("+", a, b, ...)`,
`("*", a, b, ...)`, `("/", a, b)`, `("^", a, b)`, `("neg", a)`, `("pm", a)`, `("mp", a)`, `("root", n, a)`,
`("!", a)`, `("!!", a)`, `("binom", n, k)`, `("abs", a)`, `("floor", a)`, `("ceil", a)`, `("deg", a)`,
`("log", base, a)` (base None: not given), `("sin", a)` and other functions of one argument.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from rlpost.rewards.math_text import GREEK, Unreadable
from rlpost.rewards.math_tokens import FUNCTIONS, Token, tokens

Tree = tuple[Any, ...]

_INVERSES = {"sin": "arcsin", "cos": "arccos", "tan": "arctan"}
DEEPEST = 60
"""Most levels of brackets; people write up to five."""
_ADDS = ("+", "-", "\\pm", "\\mp")


def parse(text: str) -> Tree:
    """The tree of a normalised text.

    Raises:
        Unreadable: it is not an expression, or can be read in two ways.
    """
    reader = _Reader(tokens(text))
    tree = reader.sum()
    if reader.ahead is not None:
        raise Unreadable(f"{reader.ahead.text!r} is out of place")
    return tree


class _Reader:
    """Recursive descent: sums of products of powers."""

    def __init__(self, pieces: list[Token]) -> None:
        self._pieces = pieces
        self._at = 0
        self._depth = 0
        self._bars = 0

    @property
    def ahead(self) -> Token | None:
        return self._pieces[self._at] if self._at < len(self._pieces) else None

    def _next(self) -> Token:
        token = self.ahead
        if token is None:
            raise Unreadable("it ends too early")
        self._at += 1
        return token

    def _is(self, *texts: str) -> bool:
        token = self.ahead
        return token is not None and token.kind in ("sign", "command") and token.text in texts

    def _take(self, *texts: str) -> bool:
        if self._is(*texts):
            self._at += 1
            return True
        return False

    def _expect(self, text: str) -> None:
        if not self._take(text):
            raise Unreadable(f"{text!r} is missing")

    def sum(self) -> Tree:
        self._depth += 1
        if self._depth > DEEPEST:
            raise Unreadable(f"nested more than {DEEPEST} deep")
        terms = [self._signed()]
        while self._is(*_ADDS):
            sign = self._next().text
            terms.append(_with_sign(sign, self._product()))
        self._depth -= 1
        return terms[0] if len(terms) == 1 else ("+", *terms)

    def _signed(self) -> Tree:
        if self._is(*_ADDS):
            sign = self._next().text
            if self._is("+", "-"):
                raise Unreadable("two signs in a row")
            return _with_sign(sign, self._product())
        return self._product()

    def _product(self) -> Tree:
        tree = self._power()
        slashes = 0
        while True:
            if self._take("*"):
                tree = _times(tree, self._signed_power())
            elif self._take("/"):
                slashes += 1
                if slashes > 2:
                    raise Unreadable("several quotients in a row: write brackets")
                if not self._closed_call:
                    raise Unreadable("a function's argument before / has no brackets")
                tree = ("/", tree, self._signed_power())
                follows = self.ahead
                if follows is not None and self._begins_factor(follows) and not follows.apart:
                    raise Unreadable("a factor right behind a quotient: above or below the line? write \\frac{}{}")
            elif self.ahead is not None and self._begins_factor(self.ahead):
                tree = self._implicit(tree)
            else:
                return tree

    def _implicit(self, tree: Tree) -> Tree:
        """A factor without a sign before it: `2x`, `(a)(b)`, or the fraction of a mixed number."""
        token, before = self.ahead, self._pieces[self._at - 1]
        assert token is not None
        number = before.kind == "number" and tree[0] == "num" and tree[1].denominator == 1
        if token.kind == "number":
            if number and token.apart and self._at + 2 < len(self._pieces) and self._pieces[self._at + 1].text == "/":
                return self._mixed(tree, self._slash_fraction())
            if before.text == "!":
                return _times(tree, self._power())  # 3!6!
            raise Unreadable("two numbers in a row")
        if number and token.text == "\\frac":
            fraction = self._power()
            if fraction[0] == "/" and fraction[1][0] == fraction[2][0] == "num":
                return self._mixed(tree, fraction)
            return _times(tree, fraction)
        return _times(tree, self._power())

    def _slash_fraction(self) -> Tree:
        above = self._next()
        self._expect("/")
        below = self._next()
        if below.kind != "number" or self._is("/", "^", "!"):
            raise Unreadable("a mixed number's fraction is two whole numbers")
        return ("/", _number(above.text), _number(below.text))

    def _mixed(self, whole: Tree, fraction: Tree) -> Tree:
        above, below = fraction[1][1], fraction[2][1]
        if above.denominator != 1 or below.denominator != 1 or not 0 < above < below:
            raise Unreadable("a whole number before a fraction, but no mixed number: write the sign between them")
        return ("num", whole[1] + above / below)

    def _begins_factor(self, token: Token) -> bool:
        if token.kind == "text":
            return False
        if token.kind == "command":
            return token.text not in ("\\pm", "\\mp", "\\}", "\\rfloor", "\\rceil", "\\ldots", "\\rangle")
        if token.kind == "sign":
            return token.text in ("(", "[", "{") or (token.text == "|" and self._bars == 0)
        return True

    def _signed_power(self) -> Tree:
        if self._is("+", "-"):
            sign = self._next().text
            return _with_sign(sign, self._power())
        return self._power()

    _closed_call = True
    """Whether the last function's argument stood in brackets."""

    def _power(self) -> Tree:
        tree = self._postfix(self._atom())
        if self._take("^"):
            if self._take("\\circ"):
                return self._postfix(("deg", tree))
            token = self.ahead
            if token is not None and re.fullmatch(r"⟦\s*(?:th|st|nd|rd)\s*⟧|\\prime", token.text):
                raise Unreadable("an ordinal inside an expression")
            exponent = self._exponent()
            tree = ("^", tree, exponent)
            if self._is("^"):
                raise Unreadable("two exponents in a row")
            tree = self._postfix(tree)
        return tree

    def _exponent(self) -> Tree:
        """A whole number (`2^10` is 1024), a bracket, or a sign and one of them; `a^b^c` is `a^(b^c)`."""
        if self._is("+", "-"):
            sign = self._next().text
            return _with_sign(sign, self._exponent())
        self._depth += 1
        if self._depth > DEEPEST:
            raise Unreadable(f"nested more than {DEEPEST} deep")
        token = self.ahead
        tree = self._group() if token is not None and token.text == "{" else self._atom()
        if self._take("^"):
            tree = ("^", tree, self._exponent())
        self._depth -= 1
        return tree

    def _postfix(self, tree: Tree) -> Tree:
        while self._is("!"):
            self._next()
            if self._is("!"):
                self._next()
                tree = ("!!", tree)
            else:
                tree = ("!", tree)
            if self._is("!"):
                raise Unreadable("three exclamation marks in a row")
        if self._is("'", "_"):
            raise Unreadable(f"{self._next().text!r} is out of place")
        return tree

    def _group(self) -> Tree:
        self._expect("{")
        tree = self.sum()
        self._expect("}")
        return tree

    def _atom(self) -> Tree:
        token = self._next()
        word = token.text.removeprefix("\\")
        if token.kind in ("function", "command") and (word in FUNCTIONS or word in ("log", "sqrt")):
            return self._call(word)
        tree = self._closed(token)
        self._closed_call = True
        return tree

    def _closed(self, token: Token) -> Tree:
        if token.kind == "number":
            if token.text.count("."):
                follows = self.ahead
                if follows is not None and follows.text == "(" and not follows.apart:
                    raise Unreadable("a decimal right before a bracket: a period, or a product?")
            return _number(token.text)
        if token.kind == "name":
            return self._name(token.text)
        if token.kind == "command":
            return self._command(token.text)
        if token.text in ("(", "["):
            tree = self.sum()
            self._expect(")" if token.text == "(" else "]")
            return tree
        if token.text == "{":
            self._at -= 1
            return self._group()
        if token.text == "|":
            self._bars += 1
            tree = self.sum()
            self._expect("|")
            self._bars -= 1
            return ("abs", tree)
        raise Unreadable(f"{token.text!r} is out of place")

    def _name(self, name: str) -> Tree:
        if self._take("_"):
            return ("name", f"{name}_{self._subscript()}")
        return (name,) if name in ("e", "i") else ("name", name)

    def _subscript(self) -> str:
        if not self._take("{"):
            return self._next().text.strip("⟦⟧ ")
        pieces = []
        while not self._take("}"):
            pieces.append(self._next().text.strip("⟦⟧ "))
        return "".join(pieces)

    def _command(self, name: str) -> Tree:
        word = name[1:]
        if word == "frac":
            return ("/", self._argument(), self._argument())
        if word == "binom":
            return ("binom", self._argument(), self._argument())
        if word == "pi":
            return ("pi",)
        if word == "infty":
            return ("inf",)
        if word == "bold":
            self._expect("{")
            letter = self._next().text
            self._expect("}")
            return ("name", f"bold {letter}")
        for opening, closing, kind in (("lfloor", "\\rfloor", "floor"), ("lceil", "\\rceil", "ceil")):
            if word == opening:
                tree = self.sum()
                self._expect(closing)
                return (kind, tree)
        if word in GREEK:
            return self._name(name)
        raise Unreadable(f"{name} is not read")

    def _argument(self) -> Tree:
        """A command's argument: a group in braces, or one digit or letter, as in \\frac12."""
        token = self.ahead
        if token is not None and token.text == "{":
            return self._group()
        if token is not None and token.kind == "number":
            digit, rest = token.text[0], token.text[1:]
            if not token.text.isdigit():
                raise Unreadable("a command's argument is a decimal without braces")
            self._pieces[self._at : self._at + 1] = [Token("number", digit, token.apart)] + (
                [Token("number", rest, False)] if rest else []
            )
            return _number(self._next().text)
        if token is not None and (token.kind == "name" or token.text == "\\pi"):
            return self._atom()
        raise Unreadable("a command's argument is missing")

    def _call(self, name: str) -> Tree:
        if name == "sqrt":
            return self._root()
        base: Tree | None = None
        if name == "log" and self._take("_"):
            base = self._argument()
        power: Tree | None = self._exponent() if self._take("^") else None
        if power == ("neg", ("num", Fraction(1))):
            if name not in _INVERSES:
                raise Unreadable(f"{name}^{{-1}} may be an inverse or a reciprocal")
            name, power = _INVERSES[name], None
        argument = self._operand()
        tree: Tree = ("log", base, argument) if name == "log" else (name, argument)
        if self._is("!"):
            raise Unreadable(f"a factorial behind {name}: of the argument, or of the value?")
        return tree if power is None else ("^", tree, power)

    def _operand(self) -> Tree:
        """A function's argument: a bracket, or factors side by side up to the next function."""
        token = self.ahead
        if token is not None and token.text in ("(", "[", "{", "|"):
            return self._atom()
        if self._is("-", "+"):
            raise Unreadable("a function's argument with a sign has no brackets")
        tree = self._power()
        while (token := self.ahead) is not None and self._begins_factor(token):
            if token.kind in ("function", "number") or token.text[1:] in FUNCTIONS or token.text in ("(", "[", "|"):
                break
            tree = _times(tree, self._power())
        self._closed_call = False
        return tree

    def _root(self) -> Tree:
        self._closed_call = True
        degree: Tree = ("num", Fraction(2))
        if self._take("["):
            degree = self.sum()
            self._expect("]")
        token = self.ahead
        if token is not None and token.text == "(":
            return ("root", degree, self._atom())
        if token is not None and token.kind == "number" and len(token.text) > 1:
            raise Unreadable("\\sqrt before a number of several digits has no braces")
        return ("root", degree, self._argument())


def _times(left: Tree, right: Tree) -> Tree:
    """A product as one flat tree, however many factors it has."""
    return (*left, right) if left[0] == "*" else ("*", left, right)


def _with_sign(sign: str, tree: Tree) -> Tree:
    return {"+": tree, "-": ("neg", tree), "\\pm": ("pm", tree), "\\mp": ("mp", tree)}[sign]


def _number(text: str) -> Tree:
    """The exact value of digits: thousands grouped, a period overlined, a power of ten behind e."""
    repeated = re.fullmatch(r"(\d*)\.(\d*)\\overline\s*\{\s*(\d+)\s*\}", text)
    if repeated:
        whole, once, again = repeated.groups()
        head = Fraction(int((whole or "0") + once), 10 ** len(once))
        return ("num", head + Fraction(int(again), (10 ** len(again) - 1) * 10 ** len(once)))
    digits, _, power = text.replace(",", "").lower().partition("e")
    return ("num", Fraction(digits) * Fraction(10) ** int(power or 0))


def parts(tree: Tree) -> Iterator[Tree]:
    """The tree and all trees in it."""
    waiting = [tree]
    while waiting:
        here = waiting.pop()
        yield here
        waiting += [part for part in here[1:] if isinstance(part, tuple)]
