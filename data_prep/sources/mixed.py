"""source=mixed: several sources as one corpus, each with its own settings, so that one command makes one dataset of them.

    parts:
      web:  {kind: jsonl, paths: [web/*.jsonl.gz]}
      docs: {kind: hub, repo: owner/name, subsets: {docs: {files: "data/*.parquet"}}}

The settings under each key are those of its kind. The user's own files (jsonl, parquet, text) become a part of the
corpus named by the key. Other kinds name their parts themselves: the subsets of a dataset on the hub, or what an
extracting source makes.
"""

from dataclasses import dataclass, fields
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_prep.sources.catalog import SOURCES


@dataclass(kw_only=True, slots=True)
class MixedSource:
    """Several sources by name, each a mapping with `kind` and the settings of that kind."""

    kind: str = "mixed"  # the kind of source that was chosen, by source=
    parts: dict[str, Any] = MISSING  # by name: the settings of each source

    def problems(self) -> list[str]:
        """Returns what is wrong with the values, one sentence each."""
        if not self.parts:
            return [
                "source.parts={} must name at least one source; try source.parts.web.kind=jsonl 'source.parts.web.paths=[web]'"
            ]
        found: list[str] = []
        makers: dict[str, str] = {}
        for name, values in self.parts.items():
            try:
                source = part_settings(name, values)
            except ValueError as error:
                found.append(str(error))
                continue
            found += [problem.replace("source.", f"source.parts.{name}.", 1) for problem in source.problems()]
            for part in part_names(source):
                other = makers.setdefault(part, name)
                if other != name:
                    found.append(
                        f"source.parts.{other} and source.parts.{name} both make a part {part}; give one of them another name"
                    )
        return found

    def settings(self) -> list[Any]:
        """Returns the typed settings of each source. Call it only if `problems` returns none."""
        return [part_settings(name, values) for name, values in self.parts.items()]


def sources_of(source: Any) -> list[Any]:
    """Returns the settings of the sources that a run asks: those inside a mixed one, else the one itself."""
    return source.settings() if isinstance(source, MixedSource) else [source]


def fetched_and_own(source: Any) -> tuple[list[Any], list[Any]]:
    """Returns the sources whose text is fetched once and kept, and those of the user's own files, which are searched in every run."""
    sources = sources_of(source)
    fetched = [one for one in sources if SOURCES[one.kind].fetched]
    return fetched, [one for one in sources if not SOURCES[one.kind].fetched]


def part_settings(name: str, values: Any) -> Any:
    """Returns the typed settings of one source inside a mixed one.

    Args:
        name: its key.
        values: what the user wrote there.

    Raises:
        ValueError: an unknown kind or setting, or one of the wrong type, in one sentence.
    """
    where = f"source.parts.{name}"
    if not isinstance(values, dict) or values.get("kind") not in SOURCES:
        kind = values.get("kind") if isinstance(values, dict) else values
        raise ValueError(f"{where}.kind={kind} must be one of {', '.join(SOURCES)}; try jsonl")
    schema = SOURCES[values["kind"]].settings
    known = [field.name for field in fields(schema)]
    if unknown := [key for key in values if key not in known]:
        raise ValueError(f"{where}.{unknown[0]} is not a setting of source={values['kind']}; it has {', '.join(known)}")
    if "name" in known:
        values = {"name": name, **values}
    try:
        part = OmegaConf.merge(OmegaConf.structured(schema), values)
        if missing := sorted(OmegaConf.missing_keys(part)):
            raise ValueError(f"{where}.{missing[0]}= is not set and has no default; give {where}.{missing[0]}=…")
        return OmegaConf.to_object(part)
    except OmegaConfBaseException as error:
        sentence, key = str(error).splitlines()[0], str(error.full_key or "")
        if "is not a ListConfig" in sentence:
            raise ValueError(f"{where}.{key}= takes a list; write {where}.{key}=[…], with the brackets") from None
        raise ValueError(f"{where}: {sentence}; docs/data.md lists the settings of source={values['kind']}") from None


def part_names(source: Any) -> list[str]:
    """Returns the parts of the corpus that a source makes, as far as its settings name them."""
    if hasattr(source, "subsets"):
        return list(source.subsets)
    return [source.name] if hasattr(source, "name") else []
