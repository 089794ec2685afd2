"""The settings of source=quickstart, and of source=local_docs and its presets."""

from dataclasses import dataclass, field

from ssa_pretrain.settings.problems import Problem, above_zero, at_least, between


@dataclass(kw_only=True, slots=True)
class QuickstartSource:
    """English and Python from pip packages only; about 13 MB."""

    kind: str = "quickstart"  # the kind of source, set by source=
    entries_per_page: int = 8  # encyclopaedia entries of one topic per document
    english_docs_mb: float = 2.5  # maximum MB of documentation prose from installed Python packages
    python_mb: float = 6.0  # maximum MB of Python source from installed packages

    def problems(self) -> list[Problem]:
        """Returns what is wrong with the values."""
        found = at_least("source", self, 1, "entries_per_page") + at_least("source", self, 0, "english_docs_mb")
        return found + above_zero("source", self, "python_mb")


@dataclass(kw_only=True, slots=True)
class LocalDocsSource:
    """Documentation packages of Debian or Ubuntu, and Python source from this machine; 70 MB by default."""

    kind: str = "local_docs"  # the kind of source, set by source=
    packages: list[str] = field(default_factory=list)  # Debian packages, of those in sources/packages/recipes.py
    wheels: list[str] = field(default_factory=list)  # Python packages as name==version, for their source
    python_mb: float = 10.0  # maximum MB of Python source, from `wheels` if there are any, else from installed packages
    keep_out: list[str] = field(default_factory=list)  # packages and wheels of held-out text; overlaps are dropped
    max_repeated: float | None = None  # maximum share of a document's n-grams that occurred before; null keeps all

    def problems(self) -> list[Problem]:
        """Returns what is wrong with the values."""
        found = at_least("source", self, 0, "python_mb")
        if self.max_repeated is not None:
            found += between("source", self, 0.0, 1.0, "max_repeated")
        if not self.packages and not self.wheels:
            rule = "and source.wheels=[] must name at least one package"
            found.append(Problem("source.packages", [], rule, "try source.packages=[perl-doc]", ("source.wheels",)))
        for pin in self.wheels:
            if not all(pin.partition("==")):
                advice = f"write it as {pin.partition('==')[0]}==1.2.3"
                found.append(Problem("source.wheels", None, f"has {pin}, which has no version", advice))
        for name in sorted({*self.packages, *self.wheels} & set(self.keep_out)):
            rule = f"has {name}, which the corpus includes"
            found.append(Problem("source.keep_out", None, rule, "remove it from one of the two"))
        return found
