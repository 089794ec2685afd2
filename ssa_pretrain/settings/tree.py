"""Nested mappings, such as a configuration as plain values. Standard library only."""

from collections.abc import Iterator, Mapping
from typing import Any


def flatten_settings(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the leaves of a tree with their keys, such as "optim.lr". An empty mapping is a leaf.

    Args:
        tree: by name.
        prefix: of all keys, with the dot at its end.
    """
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flatten_settings(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
