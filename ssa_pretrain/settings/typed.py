"""Text settings as they were typed: `name=2026_11_29` is that text and not the number 20261129.

Hydra's grammar and YAML 1.1 read words by their looks: 2026_11_29 is a whole number, 12e3 a float, 12:30:00 counts seconds, yes and off are truth
values, and what is written back is another text. The dataclasses know better, since each field has a type. So an override's words are put in
quotes, and a YAML file's words are read as text, wherever their field is text, a choice, or a list or mapping of these. Names in a mapping are
always text. Everything else is read as before, so numbers stay numbers, and so does YAML's null, which a text field refuses.
"""

import dataclasses
import re
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from antlr4 import CommonTokenStream, InputStream, ParserRuleContext, Token
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.override_parser.overrides_visitor import HydraErrorListener
from hydra.core.plugins import Plugins
from hydra.grammar.gen.OverrideLexer import OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader

from ssa_pretrain.settings.kinds import sections_in

READ_BY_LOOKS = (OverrideLexer.INT, OverrideLexer.FLOAT, OverrideLexer.BOOL, OverrideLexer.NULL)
TEXT, NULL, MERGE = (f"tag:yaml.org,2002:{name}" for name in ("str", "null", "merge"))
HEADER = 512  # characters of a file in which Hydra looks for its package
PATH_PART = re.compile(r"0|[1-9](_?[0-9])*|[A-Za-z_$][A-Za-z0-9_$-]*")  # what Hydra's grammar takes between dots


class UnwritableNameError(ValueError):
    """A name in a mapping that the command line cannot keep as it was typed."""

    def __init__(self, name: str) -> None:
        super().__init__(f"has the name {name}, which the command line reads as a number")


def field_type(root: Any, key: str) -> Any:
    """Returns the type of a dotted key below a dataclass, None where it has no such field."""
    kind = root
    for name in key.split("."):
        kind = _below(kind, name)
    return kind


def as_typed(line: str, type_of: Callable[[str], Any]) -> list[str]:
    """Returns the overrides that an override stands for, with text as it was typed: mostly one, the line itself.

    Args:
        line: an override that Hydra's grammar accepts.
        type_of: the type of a key's field; None: unknown, which leaves its words to Hydra.

    Raises:
        UnwritableNameError: a mapping has a name such as 1e3.
    """
    value = _parse(line).value()
    if value is None:
        return [line]
    if _odd_names(value):
        return _one_by_one(line, value, type_of)
    key = line[: value.start.start].partition("=")[0].lstrip("+~").partition("@")[0]
    for token in reversed(list(_to_quote(value, type_of(key)))):
        line = f"{line[: token.start]}'{token.text}'{line[token.stop + 1 :]}"
    return [line]


def read_yaml(text: str, kind: Any, loader: Any = yaml.SafeLoader) -> Any:
    """Returns the content of a YAML document, with text as it was typed.

    Args:
        text: the document.
        kind: the dataclass, or another type, that it is for.
        loader: the YAML loader that reads everything else.
    """
    reader = loader(text)
    try:
        node = reader.get_single_node()
        if node is None:
            return None
        _retag(node, kind)
        return reader.construct_document(node)
    finally:
        reader.dispose()


@contextmanager
def typed_files(root: type) -> Iterator[None]:
    """Makes Hydra read YAML files for a dataclass with text as it was typed."""

    class TypedFileSource(FileConfigSource):
        """Files whose words are read by the type of their field."""

        def load_config(self, config_path: str) -> ConfigResult:
            path = Path(self.path, self._normalize_file_name(config_path))
            if not path.exists():
                return super().load_config(config_path)  # raises
            text = path.read_text(encoding="utf-8")
            header = self._get_header_dict(text[:HEADER])
            group = config_path.rpartition("/")[0].replace("/", ".")
            package = (header.get("package") or "_group_").replace("_group_", group).replace("_global_", "")
            kind = field_type(root, package.strip(".")) if package.strip(".") else root
            tree = OmegaConf.create(read_yaml(text, kind, get_yaml_loader()) or {})
            return ConfigResult(self.provider, f"{self.scheme()}://{self.path}", tree, header)

    Plugins.instance()  # registers Hydra's own sources
    sources = SourcesRegistry.instance().types
    before, sources["file"] = sources["file"], TypedFileSource
    try:
        yield
    finally:
        sources["file"] = before


def _below(kind: Any, name: str) -> Any:
    """Returns the type of an entry `name` in a value of a type. If a section has several kinds, a type that takes every word as text comes first."""
    sections = sections_in(kind)
    if not sections:
        return _inner(kind)
    found = [field.type for section in sections for field in dataclasses.fields(section) if field.name == name]
    return next((type_ for type_ in found if _is_text(type_, null=True)), found[0] if found else None)


def _inner(kind: Any) -> Any:
    """Returns the type of a list's or a mapping's values. For any other type returns the type itself if it is text, else None."""
    if get_origin(kind) in (list, dict):
        return get_args(kind)[-1]
    return kind if _is_text(kind) else None


def _is_text(kind: Any, *, null: bool = False) -> bool:
    """Returns whether a field of a type takes a word as text. With `null`, a type that allows None does not."""
    if get_origin(kind) in (Union, types.UnionType):
        members = get_args(kind)
        return not (null and types.NoneType in members) and any(_is_text(member) for member in members)
    return isinstance(kind, type) and issubclass(kind, str | Enum)


def _parse(line: str) -> Any:
    """Returns the grammar's tree of an override; its classes are generated and have no types."""
    lexer = OverrideLexer(InputStream(line))
    parser = OverrideParser(CommonTokenStream(lexer))
    for part in (lexer, parser):
        part.removeErrorListeners()
        part.addErrorListener(HydraErrorListener())
    return parser.override()


def _read_by_looks(ctx: Any) -> Token | None:
    """Returns the token of a value or a name that Hydra would not read as text."""
    tokens = [node.symbol for node in ctx.getChildren() if node.symbol.type != OverrideLexer.WS]
    return tokens[0] if len(tokens) == 1 and tokens[0].type in READ_BY_LOOKS else None


def _to_quote(ctx: Any, kind: Any) -> Iterator[Token]:
    """Yields the words below a node of the grammar that are text and would not be read as text."""
    node: Any = ctx
    if isinstance(ctx, OverrideParser.PrimitiveContext):
        token = _read_by_looks(ctx)
        if token and _is_text(kind, null=token.type == OverrideLexer.NULL):
            yield token
    elif isinstance(ctx, OverrideParser.DictKeyValuePairContext):
        yield from _to_quote(node.element(), _below(kind, node.dictKey().getText().strip()))
    elif isinstance(ctx, OverrideParser.ListContainerContext):
        for element in node.element():
            yield from _to_quote(element, _inner(kind))
    elif isinstance(ctx, ParserRuleContext):
        for child in ctx.getChildren():
            yield from _to_quote(child, kind)


def _odd_names(ctx: Any) -> bool:
    """Returns whether a mapping below a node of the grammar has a name that Hydra would not read as text."""
    if not isinstance(ctx, ParserRuleContext):
        return False
    if isinstance(ctx, OverrideParser.DictKeyContext):
        return _read_by_looks(ctx) is not None
    return any(_odd_names(child) for child in ctx.getChildren())


def _one_by_one(line: str, value: Any, type_of: Callable[[str], Any]) -> list[str]:
    """Returns the entries of a mapping as separate overrides, where a name is text."""
    head, mapping = line[: value.start.start].rstrip().removesuffix("="), value.element().dictContainer()
    lines, rest = [], []
    for pair in mapping.dictKeyValuePair() if mapping else []:
        name, element = pair.dictKey().getText().strip(), pair.element()
        if PATH_PART.fullmatch(name):
            lines += as_typed(f"{head}.{name}={line[element.start.start : element.stop.stop + 1]}", type_of)
        elif _odd_names(pair):
            raise UnwritableNameError(name)
        else:
            rest.append(line[pair.start.start : pair.stop.stop + 1])
    if mapping is None:
        raise UnwritableNameError(next(_names(value)))
    return (as_typed(f"{head}={{{','.join(rest)}}}", type_of) if rest else []) + lines


def _names(ctx: Any) -> Iterator[str]:
    """Yields the names below a node of the grammar that Hydra would not read as text."""
    if isinstance(ctx, OverrideParser.DictKeyContext) and _read_by_looks(ctx):
        yield ctx.getText().strip()
    elif isinstance(ctx, ParserRuleContext):
        for child in ctx.getChildren():
            yield from _names(child)


def _retag(node: yaml.Node, kind: Any) -> None:
    """Marks the words of a YAML node as text where they are for text."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if name.tag == MERGE:
                for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    _retag(merged, kind)
                continue
            if isinstance(name, yaml.ScalarNode) and (sections_in(kind) or get_origin(kind) is dict):
                name.tag = TEXT
            _retag(value, _below(kind, str(name.value)))
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value if kind is not None else []:
            _retag(item, _inner(kind))
    elif isinstance(node, yaml.ScalarNode) and node.tag != NULL and _is_text(kind):
        node.tag = TEXT
