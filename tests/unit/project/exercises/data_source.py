"""A source of data: the docstrings of Python modules, one document per module.

    python tests/unit/project/exercises/data_source.py source=docstrings 'source.modules=[argparse,json]' out=DIR

prepares a dataset of them. A source is a dataclass of settings in the union AnySource, a function that fetches its
text, a line in SOURCES and a YAML file in data_prep/conf/source/, whose place Hydra's store takes here.
"""

import importlib
import inspect
import sys
from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore

from data_prep.progress import Log
from data_prep.sources import catalog, settings
from data_prep.sources.store import TextStore
from ssa_pretrain.settings.problems import Problem


@dataclass(kw_only=True, slots=True)
class DocstringsSource:
    """Docstrings of Python modules."""

    kind: str = "docstrings"  # the kind of source, set by source=
    modules: list[str] = field(default_factory=lambda: ["argparse", "json"])  # names of modules

    def problems(self) -> list[Problem]:
        """Returns what is wrong with the values."""
        wrong = Problem("source.modules", [], "must name at least one module", "try [argparse]")
        return [] if self.modules else [wrong]


def fetch(source: DocstringsSource, store: TextStore, log: Log) -> None:
    """Puts one document per module into the store."""
    for name in source.modules:
        log(f"text: docstrings of {name}")
        store.add_texts("docstrings", name, [document(name)])


def document(name: str) -> str:
    """Returns the docstrings of a module and of what it defines, in order of their names."""
    module = importlib.import_module(name)
    members = [member for _, member in inspect.getmembers(module) if getattr(member, "__module__", "") == name]
    return "\n\n".join(filter(None, map(inspect.getdoc, [module, *members])))


if __name__ == "__main__":
    settings.AnySource |= DocstringsSource
    catalog.SOURCES["docstrings"] = catalog.Source(DocstringsSource, fetch)
    from data_prep.cli import main  # reads AnySource when it is imported

    ConfigStore.instance().store(group="source", name="docstrings", node={"defaults": ["base_docstrings"]})
    sys.exit(main(sys.argv[1:]))
