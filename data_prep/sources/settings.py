"""The kinds of source that `source=` picks, and source=mixed, which holds several of them.

The settings of each kind are beside its source: files.py, packages/settings.py, hub/settings.py. Each dataclass returns its problems under
`source.`. No file is opened for that. What depends on files is checked where they are read.
"""

from dataclasses import dataclass, replace

from omegaconf import MISSING

from data_prep.sources.files import JsonlSource, ParquetSource, TextSource
from data_prep.sources.hub.settings import HubSource
from data_prep.sources.packages.settings import LocalDocsSource, QuickstartSource
from ssa_pretrain.settings.problems import Problem

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
