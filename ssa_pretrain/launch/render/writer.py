"""YAML of rendered files: scripts as blocks of lines, no references, and text that no version of YAML reads as something else."""

from typing import Any

import yaml


class Dumper(yaml.SafeDumper):
    """PyYAML's writer without references to equal parts."""

    def ignore_aliases(self, data: object) -> bool:
        """Returns True: equal parts are written out."""
        return True


def text_node(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Returns the node of a text."""
    style = None
    if "\n" in text:
        style = "|"
    elif not text or text[0].isdigit() or text.lower() in ("y", "n", "yes", "no", "on", "off"):
        style = '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


Dumper.add_representer(str, text_node)


def dump(document: dict[str, Any]) -> str:
    """Returns a document as YAML, its keys in the order of the dictionary."""
    return yaml.dump(document, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=200)
