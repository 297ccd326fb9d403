"""Reads YAML 1.2 that somebody else wrote: settings on the command line, and the metadata of a card."""

from __future__ import annotations

import re
from typing import Any

import yaml


_MAX_BYTES = 1 << 18
_MAX_DEPTH = 32
_MAX_NODES = 50_000

# YAML 1.2's core schema, without the 1.1 of PyYAML, in which 010 is 8, 1:30 is 90 and `no` is false.
_INT = "tag:yaml.org,2002:int"
_NULL = ("tag:yaml.org,2002:null", r"(~|null|Null|NULL|)$", ["~", "n", "N", ""])
_OTHERS = (
    ("tag:yaml.org,2002:bool", r"(true|True|TRUE|false|False|FALSE)$", "tTfF"),
    (_INT, r"([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$",
        "-+.0123456789",
    ),
)


def read_yaml(text: str, *, as_written: bool = False) -> Any:
    """Reads one document; with `as_written`, its numbers and booleans stay texts.

    `ValueError` for no YAML, a key that occurs twice, and what is too large, too deep, or grows too much by aliases.
    """
    if (size := len(text.encode(errors="surrogatepass"))) > _MAX_BYTES:
        raise ValueError(f"it has {size:,} bytes, expected at most {_MAX_BYTES:,}")
    try:
        return yaml.load(text, Loader=_TextLoader if as_written else _Loader)
    except (yaml.YAMLError, AttributeError, LookupError, RecursionError) as exc:  # PyYAML's own, on a wrong tag
        raise ValueError(str(exc)) from exc


def add_scalars(loader_or_dumper: Any) -> None:
    """Makes a class of PyYAML know this YAML's numbers, booleans and null: a dumper then quotes texts like them."""
    for tag, pattern, first in (_NULL, *_OTHERS):
        loader_or_dumper.add_implicit_resolver(tag, re.compile(pattern), list(first))


class _TextLoader(yaml.SafeLoader):
    """Reads plain scalars as texts or null."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # as in PyYAML

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = self._num_nodes = 0
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Counts nodes as if each alias were written out, before anything is built from them."""
        before, is_alias, mark = self._num_nodes, self.check_event(yaml.AliasEvent), self.peek_event().start_mark
        self._depth += 1
        node = super().compose_node(parent, index) if self._depth <= _MAX_DEPTH else None
        self._depth -= 1
        # An alias inside its own anchor has no size yet.
        self._num_nodes += self._sizes.get(node, _MAX_NODES) if is_alias else 1
        if node is None or self._num_nodes > _MAX_NODES:
            raise yaml.MarkedYAMLError(
                problem=f"more than {_MAX_NODES:,} values, or {_MAX_DEPTH} deep", problem_mark=mark
            )
        self._sizes[node] = self._num_nodes - before
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        content = super().construct_mapping(node, deep=deep)
        if len(content) < len(node.value):
            keys = [key.value for key, _ in node.value]
            twice = sorted({str(key) for key in keys if keys.count(key) > 1})
            raise yaml.MarkedYAMLError(problem=f"the keys {twice} occur twice", problem_mark=node.start_mark)
        return content


class _Loader(_TextLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        text: str = self.construct_scalar(node)
        return int(text, 10 if text.lstrip("+-").isdecimal() else 0)


_TextLoader.add_implicit_resolver(_NULL[0], re.compile(_NULL[1]), list(_NULL[2]))
add_scalars(_Loader)
_Loader.add_constructor(_INT, _Loader.construct_integer)
