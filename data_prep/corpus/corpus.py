"""The text of a run: fetched by its sources, cut into shards, identified by the sha256 of its files.

`fetch_corpus` fetches what is missing. `find_corpus` only looks at this machine and returns None if text has not been
fetched yet. Both return the same `Corpus` for the same files and settings, in every run.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_prep.config import Config
from data_prep.corpus.overwriting import overwrite_error
from data_prep.corpus.planning import Shard, file_checksums, input_digest, plan_shards
from data_prep.corpus.unreadable import with_skip_advice
from data_prep.errors import InputError, UnreadableText
from data_prep.files import digest, read_json, write_json
from data_prep.plain import to_plain, without_keys, without_unset
from data_prep.progress import Log
from data_prep.recipe import known_dataset
from data_prep.sources.catalog import SOURCES
from data_prep.sources.files import Part
from data_prep.sources.mixed import fetched_and_own, sources_of
from data_prep.sources.settings import part_names
from data_prep.sources.store import TextStore, has_other_text, known_text, stored_text
from ssa_pretrain.data.repair import command

EXTRACTION_VERSION = 2  # raise it when a source would extract different text from the same packages

# The parts of the corpus, and what each origin contributed.
PartsAndOrigins = tuple[list[Part], list[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Corpus:
    """The text to tokenize."""

    sources: list[dict[str, Any]]  # what each origin contributed, for the manifest
    shards: list[Shard]
    inputs: list[str]  # sha256 of each shard's text

    @property
    def bytes(self) -> int:
        """Bytes of input files."""
        return sum(shard.size for shard in self.shards)


def fetch_corpus(config: Config, out: Path, log: Log) -> Corpus:
    """Returns the corpus, after fetching what is not on this machine yet.

    Raises:
        InputError: the text cannot be fetched, or fetching would replace the text of another dataset.
    """
    fetched, own = fetched_and_own(config.source)
    found: PartsAndOrigins = ([], [])
    if fetched:
        key = _text_key(fetched)
        if known_dataset(out) and not config.overwrite and has_other_text(out / "text", key):
            raise overwrite_error(config)  # before its text is replaced
        found = stored_text(out / "text", key, lambda store: _fetch(fetched, store, log), _cache(config))
    return _cut_into_shards(config, out, _with_own_files(found, own, config, out, log), log)


def find_corpus(config: Config, out: Path, log: Log) -> Corpus | None:
    """Returns the corpus if it is on this machine, else None."""
    fetched, own = fetched_and_own(config.source)
    found = known_text(out / "text", _text_key(fetched)) if fetched else ([], [])
    if found is None:
        return None
    return _cut_into_shards(config, out, _with_own_files(found, own, config, out, log), log)


def require_corpus(config: Config, out: Path, log: Log) -> Corpus:
    """Returns the corpus; InputError with the stage to run first if it is not on this machine."""
    corpus = find_corpus(config, out, log)
    if corpus is None:
        raise InputError(
            f"the text of source={config.source.kind} is not in out={config.out} yet; run stage=fetch first: "
            f"`{command(out, 'stage=fetch')}`"
        )
    return corpus


def write_plan(out: Path, config: Config, corpus: Corpus | None) -> None:
    """Writes work/plan.json, a description of the shards for people and programs. No stage depends on it."""
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


def _text_key(fetched: list[Any]) -> dict[str, Any]:
    """Returns what the fetched text depends on."""
    settings = [without_unset(without_keys(to_plain(source), ("on_error",)), "max_repeated") for source in fetched]
    return {"version": EXTRACTION_VERSION, **(settings[0] if len(settings) == 1 else {"parts": settings})}


def _cache(config: Config) -> Path:
    return Path(config.cache).expanduser().absolute()


def _fetch(sources: list[Any], store: TextStore, log: Log) -> None:
    for source in sources:
        SOURCES[source.kind].fetch(source, store, log)


def _with_own_files(found: PartsAndOrigins, own: list[Any], config: Config, out: Path, log: Log) -> PartsAndOrigins:
    """Returns what was fetched, followed by the user's own files; InputError if a part is in both."""
    if not own:
        return found
    store = TextStore(out / "text", _cache(config))
    _fetch(own, store, log)
    (fetched, origins), own_parts = found, store.parts()
    if twice := {part.name for part in fetched} & {part.name for part in own_parts}:
        raise InputError(f"two sources make a part {min(twice)}; give the key of source.parts another name")
    return fetched + own_parts, origins + store.origins()


def _cut_into_shards(config: Config, out: Path, found: PartsAndOrigins, log: Log) -> Corpus:
    parts, origins = found
    on_error = {
        name: source.on_error.value
        for source in sources_of(config.source)
        if hasattr(source, "on_error")
        for name in part_names(source)
    }
    parts = [replace(part, on_error=on_error.get(part.name, "fail")) for part in parts]
    try:
        shards = plan_shards(parts, config.shard_mb)
    except UnreadableText as error:
        raise UnreadableText(with_skip_advice(str(error), config)) from None
    if not shards:
        raise InputError("the corpus is empty: its files hold no bytes; check source.paths")
    checksum_file = out / "work" / "inputs.json"
    known_checksums = read_json(checksum_file) or {}
    checksums = file_checksums(shards, known_checksums)
    corpus = Corpus(
        [{"kind": config.source.kind, **origin} for origin in origins],
        shards,
        [input_digest(shard, checksums) for shard in shards],
    )
    known = known_dataset(out)
    if known and known.inputs not in ("", digest(corpus.inputs)) and not config.overwrite:
        raise overwrite_error(config, "its text differs from the text in that dataset")  # before anything is written
    if read_json(checksum_file) != known_checksums:
        write_json(checksum_file, known_checksums)
    log(f"corpus: {corpus.bytes / 1e6:.1f} MB in {len(checksums)} files, {len(shards)} shards")
    return corpus
