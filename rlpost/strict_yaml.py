"""YAML without its traps, read and written."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from typing import Any

import yaml

LONGEST_KEY = 200
"""Characters of one."""
MAX_KEYS = 10_000
"""Keys of a file."""


class Loader(yaml.SafeLoader):
    """YAML without its traps: no aliases, no duplicate keys, no octal numbers, dates or clock times."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """A node, unless it is an alias."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases are refused - use vars and ${vars.name}",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping of names, each of which stands there once."""
        seen: set[str] = set()
        self.keys = getattr(self, "keys", 0) + len(node.value)
        if self.keys > MAX_KEYS:
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_KEYS} keys", problem_mark=node.start_mark)
        for key, _ in node.value:
            problem = ""
            if key.value == "<<" or not isinstance(key, yaml.ScalarNode):
                problem = "keys are plain names"
            elif key.tag == "tag:yaml.org,2002:null":
                problem = f"{key.value or 'nothing'} is no key - put a name in quotes"
            elif key.tag != "tag:yaml.org,2002:str":
                problem = f"{key.value} is no name - put it in quotes"
            elif len(key.value) > LONGEST_KEY:
                problem = f"a key of more than {LONGEST_KEY} characters"
            elif key.value in seen:
                problem = f"key {key.value!r} stands here twice"
            if problem:
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_PLAIN = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _PLAIN]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


class _Dumper(yaml.SafeDumper):
    """Writes what `Loader` and other readers read as it was: without aliases, and with quotes where one of them would
    take text for a number."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - the base class's signature
        """Always."""
        return True


_Dumper.yaml_implicit_resolvers = {
    first: yaml.SafeDumper.yaml_implicit_resolvers.get(first, []) + Loader.yaml_implicit_resolvers.get(first, [])
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *Loader.yaml_implicit_resolvers}
}


def dump(tree: Mapping[str, Any]) -> str:
    """Plain data as YAML, in its own order."""
    return str(yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**9))
