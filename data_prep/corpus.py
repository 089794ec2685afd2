"""The text of a run: brought to this machine by its source, cut into shards, known by the sha256 of its files.

`fetch_corpus` asks the source for what is missing; `find_corpus` only looks at what is there, and returns None where the source has
not been asked yet. Both give the same `Corpus` for the same files and settings, whoever runs them and how often.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_prep.config import Config
from data_prep.errors import InputError, UnreadableText
from data_prep.files import digest, read_json, write_json
from data_prep.planning import Shard, Subset, file_sums, input_digest, plan_shards
from data_prep.progress import Say
from data_prep.recipe import Recipe, known_dataset, parts_of, plain, recipe_of
from data_prep.run_config import Packing
from data_prep.shards import Job, shard_fingerprint
from data_prep.sources.catalog import SOURCES
from data_prep.sources.mixed import sources_of
from data_prep.sources.settings import part_names
from data_prep.sources.store import TextStore, described, has_other_text, known_text, stored_text
from data_prep.tokenizer.backends import HuggingFaceBackend
from data_prep.tokenizer.encoding import Vocabulary
from data_prep.tokenizer.vocabulary import prepare_vocabulary
from data_prep.unreadable import with_skip_advice
from ssa_pretrain.data.repair import command

HOW = (
    "endpoint",
    "connections",
    "attempts",
    "timeout_s",
)  # settings of a source that say how text is fetched, not which
EXTRACTION_VERSION = 2  # raise it when a source would extract other text from the same packages

Parts = tuple[list[Subset], list[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Corpus:
    """What there is to tokenize."""

    sources: list[dict[str, Any]]  # what each origin gave, for the manifest
    shards: list[Shard]
    inputs: list[str]  # sha256 of each shard's text

    @property
    def bytes(self) -> int:
        """Bytes of input files."""
        return sum(shard.size for shard in self.shards)


@dataclass(frozen=True, slots=True)
class Work:
    """A corpus and the tokenizer that it meets: all that determines the bytes of the shards."""

    corpus: Corpus
    vocabulary: Vocabulary
    exact: HuggingFaceBackend | None  # the tokenizer, where it had to be loaded
    jobs: list[Job]  # every shard of the corpus


def fetch_corpus(config: Config, out: Path, say: Say) -> Corpus:
    """Returns the corpus, after fetching what is not on this machine yet.

    Raises:
        InputError: the text cannot be had, or fetching would replace the text of another dataset.
    """
    kept, own = _divided(config)
    parts: Parts = ([], [])
    if kept:
        key = _key(kept)
        if known_dataset(out) and not config.overwrite and has_other_text(out / "text", key):
            raise other_dataset(config)  # before its text is replaced
        parts = stored_text(out / "text", key, lambda store: _fetch(kept, store, say), _cache(config))
    return _cut(config, out, _with_own_files(parts, own, config, out, say), say)


def find_corpus(config: Config, out: Path, say: Say) -> Corpus | None:
    """Returns the corpus if it is on this machine, else None."""
    kept, own = _divided(config)
    parts = known_text(out / "text", _key(kept)) if kept else ([], [])
    return _cut(config, out, _with_own_files(parts, own, config, out, say), say) if parts else None


def need_corpus(config: Config, out: Path, say: Say) -> Corpus:
    """Returns the corpus; InputError with the stage to run first where it is not there."""
    corpus = find_corpus(config, out, say)
    if corpus is None:
        raise InputError(
            f"the text of source={config.source.kind} is not in out={config.out} yet; run stage=fetch first: "
            f"`{command(out, 'stage=fetch')}`"
        )
    return corpus


def plan_work(config: Config, out: Path, corpus: Corpus, say: Say) -> Work:
    """Returns the jobs of a corpus, after making or finding the tokenizer."""
    vocabulary, exact = prepare_vocabulary(config, corpus.shards, corpus.inputs, out / "work")
    say(f"tokenizer: {vocabulary.name}, {vocabulary.vocab_size:,} entries")
    jobs = [
        Job(shard, shard_fingerprint(text, vocabulary, config.split))
        for shard, text in zip(corpus.shards, corpus.inputs, strict=True)
    ]
    return Work(corpus, vocabulary, exact, jobs)


def other_dataset(config: Config, reason: str = "") -> InputError:
    """Returns the refusal to replace what lies in `out`."""
    return InputError(
        f"out={config.out} holds a dataset made from other text or settings; choose another out=, or add overwrite=true "
        f"to replace it{reason and f' ({reason})'}"
    )


def refuse_other_source(config: Config, out: Path) -> None:
    """Raises InputError where the settings show that they are not those of the dataset in `out`, before anything is written.

    Sources that bring text into the folder, a tokenizer that is trained there, and what is part of the dataset's fingerprint are compared by
    their settings. The user's own files are compared by their content once it is read.
    """
    known = known_dataset(out)
    if known is None or config.overwrite:
        return
    kept, _ = _divided(config)
    if kept and known.recipe is None and known.kind and known.kind != config.source.kind:
        raise other_dataset(config, f"its text came from source={known.kind}, not from source={config.source.kind}")
    if known.recipe is None:
        return
    asked, theirs = recipe_of(config, out), known.recipe
    if kept and _fetched(asked) != _fetched(theirs):
        made, given = theirs.settings["source"]["kind"], config.source.kind
        raise other_dataset(
            config, f"its text came from source={made}" + (" with other settings" if made == given else "")
        )
    sections = ["split", "policy", "mix"]
    sections += ["tokenizer"] if config.tokenizer.kind == "bpe" else []  # a tokenizer's path may be another
    sections += ["packing"] if config.packing.kind is Packing.official_row else []
    for section in sections:
        for key, value in asked.settings[section].items():
            if (other := theirs.settings[section].get(key, value)) != value:
                raise other_dataset(config, f"made with {section}.{key}={other}, not with {section}.{key}={value}")


def _fetched(recipe: Recipe) -> list[Any]:
    """The settings of the sources that bring text into the dataset's folder or its cache, but for how they fetch it."""
    sources = [part for part in parts_of(recipe.settings["source"]) if SOURCES[part["kind"]].remembered]
    return [_without(source, HOW) for source in sources]


def _without(settings: Any, names: tuple[str, ...]) -> Any:
    if not isinstance(settings, dict):
        return settings
    return {key: _without(value, names) for key, value in settings.items() if key not in names}


def write_plan(out: Path, config: Config, corpus: Corpus | None) -> None:
    """Writes work/plan.json: what is to be made, for people and programs; no stage depends on it."""
    plan: dict[str, Any] = {"source": config.source.kind, "fetched": corpus is not None}
    if corpus is not None:
        plan["input_bytes"] = corpus.bytes
        plan["shards"] = [
            {
                "stem": shard.stem,
                "bytes": shard.size,
                "sha256": text,
                "pieces": [asdict(piece) for piece in shard.pieces],
            }
            for shard, text in zip(corpus.shards, corpus.inputs, strict=True)
        ]
    if read_json(out / "work" / "plan.json") != plan:
        write_json(out / "work" / "plan.json", plan)


def _divided(config: Config) -> tuple[list[Any], list[Any]]:
    """The run's sources whose text is remembered, and those of the user's own files, which are looked for anew each time."""
    sources = sources_of(config.source)
    kept = [source for source in sources if SOURCES[source.kind].remembered]
    return kept, [source for source in sources if not SOURCES[source.kind].remembered]


def _key(kept: list[Any]) -> dict[str, Any]:
    """What the remembered text depends on."""
    settings = [_without(plain(source), ("on_error",)) for source in kept]
    return {"version": EXTRACTION_VERSION, **(settings[0] if len(settings) == 1 else {"parts": settings})}


def _cache(config: Config) -> Path:
    return Path(config.cache).expanduser().absolute()


def _fetch(sources: list[Any], store: TextStore, say: Say) -> None:
    for source in sources:
        SOURCES[source.kind].fetch(source, store, say)


def _with_own_files(parts: Parts, own: list[Any], config: Config, out: Path, say: Say) -> Parts:
    """What is remembered, and behind it the user's own files; InputError where both have a part of one name."""
    if not own:
        return parts
    store = TextStore(out / "text", _cache(config))
    _fetch(own, store, say)
    (kept, counts), found = parts, store.subsets()
    if twice := {subset.name for subset in kept} & {subset.name for subset in found}:
        raise InputError(f"two sources make a part {min(twice)}; give the key of source.parts another name")
    return kept + found, counts + described(store)


def _cut(config: Config, out: Path, parts: Parts, say: Say) -> Corpus:
    subsets, sources = parts
    on_error = {
        name: source.on_error.value
        for source in sources_of(config.source)
        if hasattr(source, "on_error")
        for name in part_names(source)
    }
    subsets = [replace(subset, on_error=on_error.get(subset.name, "fail")) for subset in subsets]
    try:
        shards = plan_shards(subsets, config.shard_mb)
    except UnreadableText as error:
        raise UnreadableText(with_skip_advice(str(error), config)) from None
    if not shards:
        raise InputError("the corpus is empty: its files hold no bytes; check source.paths")
    memory = out / "work" / "inputs.json"
    known_sums = read_json(memory) or {}
    sums = file_sums(shards, known_sums)
    corpus = Corpus(
        [{"kind": config.source.kind, **source} for source in sources],
        shards,
        [input_digest(shard, sums) for shard in shards],
    )
    known = known_dataset(out)
    if known and known.inputs not in ("", digest(corpus.inputs)) and not config.overwrite:
        raise other_dataset(config, "the text is not the text that it was made from")  # before anything is written
    if read_json(memory) != known_sums:
        write_json(memory, known_sums)
    say(f"corpus: {corpus.bytes / 1e6:.1f} MB in {len(sums)} files, {len(shards)} shards")
    return corpus
