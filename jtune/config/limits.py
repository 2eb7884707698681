"""How much a case may ask of its reader: a file of a few lines must not fill memory, or take for ever to read."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from jtune.errors import ConfigError

MAX_NODES = 100_000  # of a YAML file, aliases expanded
MAX_DEPTH = 20  # of lists and mappings in each other
MAX_DIGITS = 40  # of a whole number as it is written
MAX_EXPANDED = 1_000_000  # characters of all values, interpolations resolved
MAX_STEPS = 20  # from one interpolation to another
MAX_INTERPOLATIONS = 50  # in one value; OmegaConf reads nested ones by recursion
LARGEST = 2**63  # whole numbers are smaller

# `${name}`, `${.name}`, `${oc.select:name}`; of what is nested, the innermost. An environment variable is no reference.
REFERENCE = re.compile(r"\$\{\s*(?:oc\.(?:select|dict\.\w+):)?\s*([^${}:,]+?)\s*(?:,[^${}]*)?\}")


def check_nodes(root: yaml.Node, path: str) -> None:
    """Raise a ConfigError if a YAML file is too large with its aliases expanded, too deep, or has too long a number."""
    if _expanded_size(root, {}) > MAX_NODES:
        raise ConfigError(f"{path}: its anchors expand to more than {MAX_NODES} values")
    for node, depth in _nodes(root, 0, set()):
        where = f"{path}:{node.start_mark.line + 1}"
        if depth > MAX_DEPTH:
            raise ConfigError(f"{where}: nested too deeply: more than {MAX_DEPTH} lists or mappings in each other")
        if node.tag.endswith(":int") and len(node.value) > MAX_DIGITS:
            raise ConfigError(f"{where}: a number of {len(node.value)} digits: {node.value[:MAX_DIGITS]}...")
        if isinstance(node, yaml.ScalarNode) and node.value.count("${") > MAX_INTERPOLATIONS:
            raise ConfigError(f"{where}: more than {MAX_INTERPOLATIONS} interpolations (${{...}}) in one value")


def check_expanded(content: Mapping[Any, Any], path: str) -> None:
    """Raise a ConfigError if interpolations make values too long, or lead from one to another for too long.

    Args:
      content: the arguments as plain values, interpolations not resolved.
    """
    values = dict(_flat(content, ()))
    below: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for key in values:
        for length in range(1, len(key) + 1):
            below.setdefault(key[:length], []).append(key)
    refers = {
        key: [leaf for at in _references(key, text) for leaf in below.get(at, [])] for key, text in values.items()
    }
    refers = {key: leaves for key, leaves in refers.items() if leaves}
    sizes, steps = {key: len(text) for key, text in values.items()}, dict.fromkeys(values, 0)
    for _ in range(2 * MAX_STEPS):  # sizes grow in each round, until each counts all that it refers to
        for key, leaves in refers.items():
            sizes[key] = min(MAX_EXPANDED + 1, len(values[key]) + sum(sizes[leaf] for leaf in leaves))
            steps[key] = 1 + max(steps[leaf] for leaf in leaves)
    if sum(sizes.values()) > MAX_EXPANDED:
        raise ConfigError(f"{path}: its interpolations (${{...}}) expand to more than {MAX_EXPANDED} characters")
    far = [".".join(key) for key, count in steps.items() if count > MAX_STEPS]
    if len(far) > MAX_STEPS:  # fewer may be a circle, which OmegaConf names
        raise ConfigError(f"{path}: {far[0]}: interpolations (${{...}}) in more than {MAX_STEPS} steps")


def fault_of(value: Any) -> str | None:
    """Why a value cannot be one of an argument: a character that no path has, or a number that is too large."""
    if isinstance(value, str):
        return "it holds a NUL character" if "\0" in value else None
    if isinstance(value, int) and not -LARGEST < value < LARGEST:
        return f"a whole number is below 2**63, not {str(value)[:MAX_DIGITS]}"
    inner = [*value, *value.values()] if isinstance(value, Mapping) else value if isinstance(value, list) else []
    return next(filter(None, map(fault_of, inner)), None)


# ---------------------------------------------------------------------- YAML


def _expanded_size(node: yaml.Node, seen: dict[int, float]) -> float:
    """Number of nodes with every alias expanded; infinite when an alias contains itself."""
    if id(node) not in seen:
        seen[id(node)] = float("inf")
        seen[id(node)] = 1 + sum(_expanded_size(child, seen) for child in _children(node))
    return seen[id(node)]


def _nodes(node: yaml.Node, depth: int, seen: set[int]) -> Iterator[tuple[Any, int]]:
    """Each node once, with the number of nodes that it lies in."""
    if id(node) in seen:
        return
    seen.add(id(node))
    yield node, depth
    for child in _children(node):
        yield from _nodes(child, depth + 1, seen)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


# ---------------------------------------------------------------------- interpolations


def _flat(value: Any, at: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each text of nested values under its path."""
    if isinstance(value, Mapping | list):
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _flat(inner, (*at, str(key)))
    else:
        yield at, str(value)


def _references(key: tuple[str, ...], text: str) -> Iterator[tuple[str, ...]]:
    """The paths that a text at `key` refers to.

    >>> list(_references(("a", "b"), "${c.d}/${.e}/${f[0]}/${oc.env:HOME}"))
    [('c', 'd'), ('a', 'e'), ('f', '0')]
    """
    for name in REFERENCE.findall(text):
        dots = len(name) - len(name.lstrip("."))
        inside = key[: max(0, len(key) - dots)] if dots else ()
        yield (*inside, *filter(None, re.split(r"[.\[\]]+", name)))
