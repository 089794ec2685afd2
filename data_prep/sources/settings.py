"""The settings of each kind of source, which `source=` picks; HubSource's are in hub/settings.py.

Each dataclass returns its problems under `source.`. No file is opened here: what must be looked up on the disk is checked where it is read.
"""

from dataclasses import dataclass, field, replace

from omegaconf import MISSING

from data_prep.run_config import OnError
from data_prep.sources.hub.settings import HubSource
from ssa_pretrain.settings.problems import Problem, above_zero, at_least


@dataclass(kw_only=True, slots=True)
class QuickstartSource:
    """English and Python that pip alone provides; about 13 MB."""

    kind: str = "quickstart"  # the kind of source, set by source=
    entries_per_page: int = 8  # encyclopaedia entries of one topic joined into a document; 1 leaves them apart
    english_docs_mb: float = 2.5  # most MB of documentation prose taken from installed Python packages
    python_mb: float = 6.0  # most MB of Python source taken from installed packages

    def problems(self) -> list[Problem]:
        """Returns what is wrong with the values."""
        found = at_least("source", self, 1, "entries_per_page") + at_least("source", self, 0, "english_docs_mb")
        return found + above_zero("source", self, "python_mb")


@dataclass(kw_only=True, slots=True)
class LocalDocsSource:
    """Documentation packages of Debian or Ubuntu, and Python source from this machine; 70 MB by default."""

    kind: str = "local_docs"  # the kind of source, set by source=
    packages: list[str] = field(
        default_factory=list
    )  # Debian packages; data_prep/sources/packages/recipes.py has those it can read
    wheels: list[str] = field(default_factory=list)  # Python packages, name==version, of which the source is text
    python_mb: float = (
        10.0  # most MB of Python source, from `wheels`, or without them from what is installed; 0 for none
    )
    keep_out: list[str] = field(default_factory=list)  # packages and wheels whose text is held out: no overlap is kept

    def problems(self) -> list[Problem]:
        """Returns what is wrong with the values."""
        found = at_least("source", self, 0, "python_mb")
        if not self.packages and not self.wheels:
            rule = "and source.wheels=[] must name at least one package"
            found.append(Problem("source.packages", [], rule, "try source.packages=[perl-doc]", ("source.wheels",)))
        for pin in self.wheels:
            if not all(pin.partition("==")):
                advice = f"write it as {pin.partition('==')[0]}==1.2.3"
                found.append(Problem("source.wheels", None, f"has {pin}, which names no version", advice))
        for name in sorted({*self.packages, *self.wheels} & set(self.keep_out)):
            rule = f"holds {name} out, and the corpus takes it"
            found.append(Problem("source.keep_out", None, rule, "remove it from one of the two"))
        return found


@dataclass(kw_only=True, slots=True)
class JsonlSource:
    """JSON lines, plain or compressed (.gz, .zst): one object per line, one document per object."""

    kind: str = "jsonl"  # the kind of source, set by source=
    name: str = "text"  # name of this part of the corpus; files of the dataset are called after it
    paths: list[str] = MISSING  # files, folders or glob patterns
    text_column: str = "text"  # key of the text in each object
    on_error: OnError = OnError.fail  # what becomes of lines, rows and files that cannot be read as text

    def problems(self) -> list[Problem]:
        """Returns what is wrong with the values."""
        return _named_paths(self.name, self.paths) + _text_column(self.text_column)


@dataclass(kw_only=True, slots=True)
class ParquetSource:
    """Parquet files, one document per row."""

    kind: str = "parquet"  # the kind of source, set by source=
    name: str = "text"  # name of this part of the corpus; files of the dataset are called after it
    paths: list[str] = MISSING  # files, folders or glob patterns
    text_column: str = "text"  # column of the text; must be a string column
    on_error: OnError = OnError.fail  # what becomes of lines, rows and files that cannot be read as text

    def problems(self) -> list[Problem]:
        """Returns what is wrong with the values."""
        return _named_paths(self.name, self.paths) + _text_column(self.text_column)


@dataclass(kw_only=True, slots=True)
class TextSource:
    """Plain UTF-8 files, one document per file."""

    kind: str = "text"  # the kind of source, set by source=
    name: str = "text"  # name of this part of the corpus; files of the dataset are called after it
    paths: list[str] = MISSING  # files, folders or glob patterns
    suffixes: list[str] = field(default_factory=lambda: [".txt", ".md", ".rst", ".py"])  # which files of a folder count
    on_error: OnError = OnError.fail  # what becomes of lines, rows and files that cannot be read as text

    def problems(self) -> list[Problem]:
        """Returns what is wrong with the values."""
        found = _named_paths(self.name, self.paths)
        if not self.suffixes:
            found.append(Problem("source.suffixes", [], "must name at least one suffix", "try [.txt]"))
        return found


PartSource = QuickstartSource | LocalDocsSource | HubSource | JsonlSource | ParquetSource | TextSource


@dataclass(kw_only=True, slots=True)
class MixedSource:
    """Several sources by name, each with `kind` and the settings of that kind."""

    kind: str = "mixed"  # the kind of source, set by source=
    parts: dict[str, PartSource] = MISSING  # by name: the settings of each source

    def problems(self) -> list[Problem]:
        """Returns what is wrong with the values."""
        if not self.parts:
            advice = "try source.parts.web.kind=jsonl 'source.parts.web.paths=[web]'"
            return [Problem("source.parts", {}, "must name at least one source", advice)]
        found: list[Problem] = []
        makers: dict[str, str] = {}
        for name, source in self.parts.items():
            for problem in source.problems():
                key, *reads = (
                    f"source.parts.{name}.{k.removeprefix('source.')}" for k in (problem.key, *problem.reads)
                )
                found.append(replace(problem, key=key, reads=tuple(reads)))
            for part in part_names(source):
                other = makers.setdefault(part, name)
                if other != name:
                    rule = f"and source.parts.{name} both make a part {part}"
                    found.append(Problem(f"source.parts.{other}", None, rule, "give one of them another name"))
        return found

    def settings(self) -> list[PartSource]:
        """Returns the settings of each source."""
        return list(self.parts.values())


AnySource = PartSource | MixedSource


def part_names(source: PartSource) -> list[str]:
    """Returns the parts of the corpus that a source makes, as far as its settings name them."""
    if isinstance(source, HubSource):
        return list(source.subsets)
    return [source.name] if isinstance(source, JsonlSource | ParquetSource | TextSource) else []


def _named_paths(name: str, paths: list[str]) -> list[Problem]:
    found = []
    if not name or not all(c.isalnum() or c in "-_" for c in name):
        found.append(Problem("source.name", name, "must be made of letters, digits, - and _", "try text"))
    if not paths:
        advice = "try 'source.paths=[my_folder]'"
        found.append(Problem("source.paths", [], "must name at least one file, folder or pattern", advice))
    return found


def _text_column(column: str) -> list[Problem]:
    return [] if column else [Problem("source.text_column", "", "must not be empty", "try text")]
