"""source=mixed: several sources as one corpus, each with settings of its own, so that one command makes one dataset of them.

    parts:
      web:  {kind: jsonl, paths: [web/*.jsonl.gz]}
      docs: {kind: hub, repo: owner/name, subsets: {docs: {files: "data/*.parquet"}}}

A part's settings are those of its kind. Files of the user's own (jsonl, parquet, text) become a part of the corpus under the key; other kinds
name theirs themselves: the subsets of a hub's dataset, what an extracting source makes.
"""

from dataclasses import dataclass, fields
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_prep.sources.catalog import SOURCES


@dataclass(kw_only=True, slots=True)
class MixedSource:
    """Several sources by name; each is a mapping with `kind` and the settings of that kind."""

    kind: str = "mixed"  # the kind of source that was chosen, by source=
    parts: dict[str, Any] = MISSING  # by name: the settings of each part's source

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
                part = part_settings(name, values)
            except ValueError as error:
                found.append(str(error))
                continue
            found += [problem.replace("source.", f"source.parts.{name}.", 1) for problem in part.problems()]
            for made in part_names(part):
                other = makers.setdefault(made, name)
                if other != name:
                    found.append(
                        f"source.parts.{other} and source.parts.{name} both make a part {made}; give one of them another name"
                    )
        return found

    def settings(self) -> list[Any]:
        """Returns the settings of each part, typed; `problems` has found none."""
        return [part_settings(name, values) for name, values in self.parts.items()]


def sources_of(source: Any) -> list[Any]:
    """Returns the settings of the sources that a run asks: the parts of a mixed one, else the one itself."""
    return source.settings() if isinstance(source, MixedSource) else [source]


def part_settings(name: str, values: Any) -> Any:
    """Returns the typed settings of one part.

    Args:
        name: its key.
        values: what the user wrote there.

    Raises:
        ValueError: no such kind or setting, or one of another type, in one sentence.
    """
    where = f"source.parts.{name}"
    if not isinstance(values, dict) or values.get("kind") not in SOURCES:
        kind = values.get("kind") if isinstance(values, dict) else values
        raise ValueError(f"{where}.kind={kind} must be one of {', '.join(SOURCES)}; try jsonl")
    schema = SOURCES[values["kind"]].settings
    known = [field.name for field in fields(schema)]
    if wrong := [key for key in values if key not in known]:
        raise ValueError(f"{where}.{wrong[0]} is no setting of source={values['kind']}; it has {', '.join(known)}")
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
        raise ValueError(f"{where}: {sentence}; see docs/data.md for what source={values['kind']} takes") from None


def part_names(part: Any) -> list[str]:
    """Returns the names of the parts of the corpus that a source makes, where its settings name them."""
    if hasattr(part, "subsets"):
        return list(part.subsets)
    return [part.name] if hasattr(part, "name") else []
