"""The reward `code`: right programs pass, wrong ones fail, and none seems right that is not."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from rlpost.errors import DataError, RecipeError
from rlpost.rewards.code import code, program_of
from rlpost.rewards.code_driver import encoded
from rlpost.rewards.code_tests import Assertion, read_tests
from rlpost.rewards.code_values import FAILURES, Each, decoded
from rlpost.sandbox.run import run
from rlpost.types import Completion

AREA = {"tests": ["assert area(2, 3) == 6", "assert area(4, 5) == 20", "assert area(0.5, 3) == 1.5"]}
SQUARES = {"tests": [{"input": "2\n", "output": "4\n"}, {"input": "3\n", "output": "9\n"}]}


def said(text: str) -> Completion:
    return Completion(ids=(), action=(), text=text, finish="stop")


def scores(programs: list[str], example: dict[str, Any], **arguments: Any) -> list[float | None]:
    return code([said(text) for text in programs], [example] * len(programs), **arguments)


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("x = 1", "x = 1"),
        ("So:\n```python\nx = 1\n```\nIt works.", "x = 1\n"),
        ("```\nx = 1\n```\nor\n~~~py\nx = 2\n~~~\n", "x = 2\n"),
        ("```python\nx = 1\n```\nrun\n```bash\nls\n```", "x = 1\n"),
        ("````python\nx = '''\n```\n'''\n````", "x = '''\n```\n'''\n"),
        ("```Python3\nx = 1", "x = 1\n"),
        ("```python\r\nx = '\x0c'\r\n```\r\n", "x = '\x0c'\n"),
        ("```bash\nls\n```", "```bash\nls\n```"),
    ],
)
def test_the_program_is_the_last_block_of_python(text: str, program: str):
    assert program_of(text) == program


def test_the_reward_is_the_share_of_tests_that_pass():
    programs = [
        "```python\ndef area(a, b):\n    print('working')\n    return a * b\n```",
        "def area(a, b): return int(a) * b",
        "def area(a, b): return 6",
        "def area(a, b): return a *",
        "def area(a, b): return a * b if a < 4 else exit()",
        "import os\ndef area(a, b): return a * b if a != 4 else os._exit(0)",
        "import os\nos._exit(0)",
        "",
    ]
    assert scores(programs, AREA) == [1, 2 / 3, 1 / 3, 0, 2 / 3, 1 / 3, 0, 0]
    assert scores(programs[:3], AREA, partial=False) == [1, 0, 0]


def test_what_a_program_prints_is_compared():
    programs = [
        "print(int(input()) ** 2)",
        "n = int(input())\nprint(f'{n * n}   \\n\\n')\nexit()",
        "print(4)",
        "print(int(input()) ** 2)\nraise SystemExit(1)",
        "print(int(input()) ** 2, 'is the answer')",
    ]
    assert scores(programs, SQUARES) == [1, 1, 0.5, 0, 0]


@pytest.mark.slow
def test_what_comes_after_a_test_that_took_too_long_has_failed():
    """Five seconds."""
    squares = "n = int(input())\nprint(n * n)\nwhile n == 2: pass"
    assert scores([squares], SQUARES, deadline=1) == [0]
    assert scores([squares], {"tests": SQUARES["tests"][::-1]}, deadline=1) == [0.5]
    area = "def area(a, b):\n    while a == 4: pass\n    return a * b"
    assert scores([area], AREA, deadline=1) == [1 / 3]


FAKES = {
    "printing": "print('[0, [6]]\\n[1, [20]]\\n[2, [1.5]]')",
    "another number": "def area(a, b): return 6.0000001",
    "leaving early": "import sys\nsys.exit(0)",
    "leaving at once": "import os\nos._exit(0)",
    "leaving at the end": "import atexit, os\natexit.register(os._exit, 0)\ndef area(a, b): return 0",
    "equal to all": "class Yes:\n    def __eq__(self, other): return True\ndef area(a, b): return Yes()",
    "a number equal to all": "class Yes(int):\n    def __eq__(self, other): return True\ndef area(a, b): return Yes(0)",
    "a float in disguise": "class Yes(float):\n    def hex(self): return '0x1p0'\ndef area(a, b): return Yes(7)",
    "other builtins": "import builtins\nbuiltins.isinstance = lambda *a: True\ndef area(a, b): return True",
    "another encoder": "import json\njson.dumps = lambda value: '[0, true]'\ndef area(a, b): return True",
    "the encoder's frame": (
        "import sys\ndef area(a, b):\n    f = sys._getframe()\n    while f:\n        f.f_locals.update(values=[True])\n"
        "        f = f.f_back\n    return True"
    ),
    "reading its caller": (
        "import inspect, sys, re\ndef area(a, b):\n    text = inspect.getsource(sys.modules['answer'])\n"
        "    return float((re.findall(r'== *([0-9.]+)', text) or [-1])[0])"
    ),
    "all guesses": (
        "import os\nfor n in range(3, 20):\n    for v in (6, 20, 1.5):\n"
        "        for k in range(3):\n            try: os.write(n, f'[{k}, [{v}]]\\n'.encode())\n"
        "            except OSError: pass"
    ),
    "answers of two kinds": "def area(a, b):\n    import os\n    os.write(3, b'[0, [6]]\\n[0, [7]]\\n')\n    return 7",
    "another asking": "def asked_0(): return [6]\ndef asked_1(): return [20]\ndef asked_2(): return [1.5]",
    "a tracer": "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)\ndef area(a, b): pass",
    "no assertions": "import sys\nsys.flags = None\n__debug__ = False",
    "a module of its own": "import sys, types\nsys.modules['json'] = types.ModuleType('json')\ndef area(a, b): pass",
    "a nested answer": "def area(a, b):\n    x = []\n    for _ in range(900): x = [x]\n    return x",
    "an endless answer": "def area(a, b):\n    while True: yield 6",
    "a huge answer": "def area(a, b): return 6 << (1 << 22)",
    "no number": "def area(a, b): return float('nan')",
    "forking": "import os\nos.fork()\ndef area(a, b): return 6",
    "killing": "import os, signal\nos.kill(0, signal.SIGKILL)\ndef area(a, b): return 6",
}


def test_no_program_seems_right_that_is_not():
    found = scores(
        list(FAKES.values()), {"tests": ["assert area(2, 3) == 6", "assert area(4, 5) == 20"]}, partial=False
    )
    assert {name: score for name, score in zip(FAKES, found, strict=True) if score} == {}
    told = (Path(__file__).parents[2] / "docs/sandbox.md").read_text("utf-8")
    assert f"| seeming right without being so | {len(FAKES)} | 0 | 0 |" in told


def test_an_answer_counts_only_if_it_is_the_only_one():
    """The first of these guesses is right."""
    assert scores([FAKES["all guesses"]], {"tests": ["assert area(2, 3) == 6"]}) == [0]


def test_some_of_them_seem_right_where_assertions_run_beside_the_program():
    """As a judge would see it that runs both in one process and looks at its exit code."""
    beside = "\nassert area(2, 3) == 6\nassert area(4, 5) == 20\n"
    fooled = {
        name for name in ("leaving early", "leaving at once", "equal to all") if run(FAKES[name] + beside).succeeded
    }
    assert fooled == {"leaving early", "leaving at once", "equal to all"}


def test_equal_completions_are_run_once(monkeypatch: pytest.MonkeyPatch):
    ran: list[str] = []
    monkeypatch.setattr("rlpost.rewards.code._share", lambda program, tests, **_: float(ran.append(program) is None))
    assert scores(["def area(a, b): return 1"] * 4, AREA) == [1] * 4
    assert len(ran) == 1


ASSERTIONS = {
    "assert f(1) == 1": "f(1)",
    "assert f(1) != -2, 'message'": "f(1)",
    "assert not f([])": "f([])",
    "assert 0 < f(1) <= 2.5": "f(1)",
    "assert abs(f(1) - f(2)) < 1e-6": "f(1); f(2)",
    "assert math.isclose(f(1), 2, rel_tol=1e-3)": "f(1)",
    "assert f(1) is None": "f(1)",
    "assert f(1) in [1, 2] or f(2) == {'a': (1, 2)}": "f(1); f(2)",
    "assert set(f(1)) == set((1, 2))": "f(1)",
    "assert sorted(f(1), reverse=True) == list(range(3, 0, -1))": "f(1)",
    "assert sorted(f(1), key=abs) == [1]": "sorted(f(1), key=abs)",
    "assert [f(x) for x in range(3)] == [0] * 3": "[f(x) for x in range(3)]",
    "assert [f(1), f(2)] == [1, 2]": "f(1); f(2)",
    "assert all([f(1), f(2) == 3])": "f(1); f(2)",
    "assert f(lambda x: x > 2, [1])[0].name == 'a'": "f(lambda x: x > 2, [1])[0].name",
    "assert isinstance(f(1), (int, float))": "f(1)",
    "s = Stack()\ns.push(3)\nassert s.pop() == 3 and s.is_empty()": "s.pop(); s.is_empty()",
    "assert is_prime(len([1, 2]))": "is_prime(len([1, 2]))",
    "assert f(g(2)) == 1": "f(g(2))",
    "assert round(f(1), 2) == 10 ** 2 - 99.5": "f(1)",
}


@pytest.mark.parametrize("text", ASSERTIONS)
def test_the_program_is_asked_for_what_it_defines_alone(text: str):
    (test,) = read_tests({"tests": [text]}, "tests")
    assert isinstance(test, Assertion)
    assert "; ".join(map(ast.unparse, test.asked)) == ASSERTIONS[text]
    assert ast.parse(test.function(0))


@pytest.mark.parametrize(
    ("text", "answers", "passed"),
    [
        ("assert f(1) == 1", [True], True),
        ("assert f(1) == 1", [1.0], True),
        ("assert f(1) == [1]", [(1,)], False),
        ("assert list(f(1)) == [1]", [iter([1])], True),
        ("assert f(1) == [1]", [iter([1])], False),
        ("assert f(1) == {1: {2}, 'a': b'x'}", [{1: {2}, "a": b"x"}], True),
        ("assert f(1) == (2j, None, 1e400)", [(2j, None, float("inf"))], True),
        ("assert f(1) == 2 ** 70", [1 << 70], True),
        ("assert 0 < f(1) < 3", [3], False),
        ("assert not f(1)", [""], True),
        ("assert f(1) is True", [1], False),
        ("assert isinstance(f(1), (int, str))", [1.0], False),
        ("assert abs(f(1) - f(2)) < 0.1", [1, 1.05], True),
        ("assert f(1) == 2 or f(2) == 2", [1, 2], True),
        ("assert max(f(1), default=3) == 3", [[]], True),
        ("assert f(1) < 3", ["a"], False),
        ("assert len(f(1)) == 2", [3], False),
        ("assert f(1) * 3 == 'aaa'", ["a"], True),
        ("assert f(1) * f(2) == ''", ["a" * 1000, 1 << 40], False),
        ("assert f(1) ** f(2) == 0", [10, 1 << 40], False),
        ("assert round(f(1), f(2)) == 0", [10, -(1 << 40)], False),
        ("assert f(1) % 3 == ''", ["%999999999d"], False),
    ],
)
def test_assertions_are_decided_here(text: str, answers: list[Any], passed: bool):
    (test,) = read_tests({"tests": [text]}, "tests")
    assert isinstance(test, Assertion)
    assert test.passed([encoded(answer) for answer in answers]) is passed


@pytest.mark.parametrize(
    "answers",
    [
        *(None, 3, [], [1, 2], [{}], [{"int": "x"}], [{"int": 3}], [{"set": [[1]]}], [{"dict": [[1]]}], [{"dict": 3}]),
        *(
            [{"object": []}],
            [{"float": "y"}],
            [{"tuple": 1}],
            [{"a": 1, "b": 2}],
            [{"bytes": "zz"}],
            [{"complex": [1]}],
        ),
    ],
)
def test_what_is_no_answer_fails(answers: Any):
    (test,) = read_tests({"tests": ["assert f(1) == 1"]}, "tests")
    assert isinstance(test, Assertion)
    assert test.passed(answers) is False


def test_values_keep_their_types_on_the_way():
    for value in (None, True, 3, -(1 << 80), 0.1, float("-inf"), 1 + 2j, "ä\ud800", b"\0", [1, (2, {3}), {(4,): [5]}]):
        assert decoded(encoded(value)) == value
        assert type(decoded(encoded(value))) is type(value)
    assert isinstance(decoded(encoded({}.keys())), Each)
    with pytest.raises(FAILURES):
        encoded(object())


REFUSED = {
    "assert f(1) ==": "is no Python",
    "f(1) == 1": "asserts nothing",
    "assert f(1) == 1\nassert f(2) == 2": "has other statements before it",
    "for x in [1]: pass\nassert f(1) == 1": "has other statements before it",
    "x = yield\nassert f(1) == 1": "has other statements before it",
    "from math import *\nassert f(1) == 1": "imports *",
    "assert 1 == 1": "calls nothing of the program",
    "assert sum([1, 2]) == 3": "calls nothing of the program",
    "assert f(1) == f(2)": "compares what the program says with what it says",
    "assert f(1) == Fraction(1, 2)": "compares what the program says with what it says",
    "assert f(1) is 3": "compares by `is`",
    "assert f(1) == 1 / 0": "cannot be computed (division by zero)",
    "assert f(1) == [0] * 10000000": "cannot be computed",
    "assert list(range(f(1))) == [0]": "has a range as long as the program says",
    "assert all(f(x) == x for x in [1])": "decides within",
    "assert isclose(f(1), 2)": "lets the program judge 'f(1)'",
    "assert isclose(f(1), 2) == True": "lets the program judge 'f(1)'",
    "assert f('a').startswith('a')": "trusts 'startswith' of what the program returns",
    "assert " + "+".join(["f(1)"] * 2000) + " == 1": "is nested too deeply",
}


@pytest.mark.parametrize("text", REFUSED)
def test_assertions_that_could_not_be_decided_here_are_refused(text: str):
    with pytest.raises(DataError) as raised:
        read_tests({"tests": ["assert f(0) == 0", text]}, "tests")
    message = str(raised.value)
    assert message.startswith("code: tests[1]: ")
    assert REFUSED[text] in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"test": []}, "code: column: a row has no column 'tests' - did you mean 'test'?"),
        ({"tests": []}, "code: column: 'tests' is empty in a row; leave such rows out of the data"),
        ({"tests": "assert f(1) == 1"}, "code: column: 'tests' is a str in a row; give a list of tests"),
        ({"tests": None}, "code: column: 'tests' is a NoneType in a row; give a list of tests"),
        ({"tests": [3]}, "code: tests[0]: is no test; give an assertion as text, or {input: TEXT, output: TEXT}"),
        ({"tests": [{"input": "a"}]}, "code: tests[0]: is no test; give an assertion as text, or"),
        ({"tests": [*AREA["tests"], *SQUARES["tests"]]}, "give tests of one kind"),
    ],
)
def test_rows_without_tests_are_refused(example: dict[str, Any], message: str):
    with pytest.raises(DataError) as raised:
        scores(["x"], example)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"deadline": 0}, "sandbox: deadline is 0; give seconds a run, more than 0, at most 3600"),
        ({"memory": 8}, "sandbox: memory is 8 MiB; Python needs at least 64 to start"),
        ({"level": "namespace"}, "sandbox: no level 'namespace' - did you mean 'namespaces'?"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str):
    with pytest.raises(RecipeError) as raised:
        scores(["x"], AREA, **arguments)
    assert str(raised.value) == message
