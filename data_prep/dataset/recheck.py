"""Encodes documents again: compares the text on the disk with the tokens of a finished dataset.

Checksums show that files are unchanged since they were written. Only the text shows that what was written is correct.
So the beginnings of shards spread over the plan are read, split and encoded by `tokenizers` itself, and compared with
the documents in the dataset. This needs out/work and unchanged input. Without them nothing is compared, and the result
reports that.
"""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.config import SplitConfig
from data_prep.corpus.splitting import is_heldout
from data_prep.errors import InputError
from data_prep.files import read_json
from data_prep.readers import Piece, read_piece
from data_prep.shards.binaries import with_suffix
from data_prep.tokenizer.encoding import Encoder, Vocabulary
from ssa_pretrain.data.indexed_format import HEADER, token_dtype
from ssa_pretrain.data.manifest import SPLITS, Manifest, ShardInfo

MAX_SHARDS, MAX_DOCUMENT_BYTES = 20, 100_000


def recheck(manifest: Manifest, documents: int) -> tuple[list[str], str]:
    """Returns the documents whose tokens do not match their text, and a sentence about how many were compared."""
    plan = read_json(manifest.root / "work" / "plan.json")
    if not isinstance(plan, dict) or not plan.get("shards"):
        return [], "no document was encoded again: out/work is gone"
    places, inputs = _places(manifest), manifest.details.get("inputs")
    shards = [entry for entry in plan["shards"] if entry["stem"] in places]
    # The plan and the records may be those of a run with other settings, which was rejected or interrupted.
    shards = [entry for entry in shards if inputs is None or inputs.get(entry["stem"]) == entry["sha256"]]
    if not shards:
        return [], "no document was encoded again: out/work is another run's; the dataset's own command restores it"
    checksums = read_json(manifest.root / "work" / "inputs.json") or {}
    shards = [entry for entry in shards if all(_unchanged(piece, checksums) for piece in entry["pieces"])]
    if not shards:
        return [], "no document was encoded again: the text is gone or has changed"
    chosen = shards[:: max(1, len(shards) // MAX_SHARDS)][:MAX_SHARDS]
    encoder, found, compared = _encoder(manifest), [], 0
    for entry in chosen:
        problem, count = _compare(manifest, encoder, entry, places[entry["stem"]], max(1, documents // len(chosen)))
        found += problem
        compared += count
    return found, f"{compared} documents of {len(chosen)} shards, encoded again, match the dataset"


def _encoder(manifest: Manifest) -> Encoder:
    tokenizer, policy = manifest.tokenizer, manifest.policy
    return Encoder(
        Vocabulary(
            path=str(manifest.root / tokenizer.file),
            sha256=tokenizer.sha256,
            name=tokenizer.name,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            bos_id=tokenizer.bos_id,
            add_bos=policy["add_bos"],
            append_eos=policy["append_eos"],
            specials_as_text=policy["specials"] == "text",
            row_tokens=policy.get("row_tokens", 0),
        )
    )


def _places(manifest: Manifest) -> dict[str, dict[str, tuple[ShardInfo, int]]]:
    """Returns for each shard and split the file that holds it and the index of its first document there."""
    files = {(split, Path(s.prefix).name): s for split in SPLITS for s in manifest.splits[split]}
    fingerprints = manifest.details.get("fingerprints", {})
    places: dict[str, dict[str, tuple[ShardInfo, int]]] = {}
    for stem, members in manifest.details.get("members", {}).items():
        first = dict.fromkeys(SPLITS, 0)
        for member in members:
            record = read_json(manifest.root / "work" / "shards" / f"{member}.json")
            if not isinstance(record, dict) or record["fingerprint"] != fingerprints.get(member, record["fingerprint"]):
                break
            places[member] = {}
            for split in SPLITS:
                if record["splits"][split]:
                    places[member][split] = (files[split, stem], first[split])
                    first[split] += record["splits"][split]["documents"]
    return places


def _unchanged(piece: dict[str, Any], checksums: dict[str, Any]) -> bool:
    try:
        stat = Path(piece["path"]).stat()
    except OSError:
        return False
    return checksums.get(piece["path"], [])[:2] == [stat.st_size, stat.st_mtime_ns]


def _compare(
    manifest: Manifest, encoder: Encoder, entry: dict[str, Any], place: dict[str, tuple[ShardInfo, int]], count: int
) -> tuple[list[str], int]:
    split = SplitConfig(**manifest.details["split"])
    at = {split_name: first for split_name, (_, first) in place.items()}
    compared = 0
    try:
        for text, raw in islice(read_piece(Piece(**entry["pieces"][0]), lambda _: None), count):
            if not raw or raw.isspace():
                continue
            name = "heldout" if is_heldout(raw, split) else "train"
            if name not in place:
                return [f"{name}: shard {entry['stem']} has a document that the dataset lacks, {text[:40]!r}"], compared
            if len(raw) > MAX_DOCUMENT_BYTES:
                return [], compared  # the start of the next document is unknown without encoding this one
            for ids in encoder.encode([text]):
                if not np.array_equal(ids, _document(manifest, place[name][0], at[name])):
                    return [
                        f"{place[name][0].prefix}: document {at[name]} does not match the text that begins {text[:40]!r} (shard "
                        f"{entry['stem']}, {entry['pieces'][0]['path']})"
                    ], compared
                at[name] += 1
            compared += 1
    except InputError:
        return [], compared
    return [], compared


def _document(manifest: Manifest, info: ShardInfo, number: int) -> np.ndarray:
    prefix = manifest.prefix_path(info)
    idx, dtype = with_suffix(prefix, ".idx"), token_dtype(manifest.tokenizer.vocab_size)
    if number >= info.documents:
        return np.empty(0, dtype=dtype)
    length = np.fromfile(idx, dtype="<i4", count=1, offset=HEADER.size + 4 * number)
    start = np.fromfile(idx, dtype="<i8", count=1, offset=HEADER.size + 4 * info.documents + 8 * number)
    return np.fromfile(with_suffix(prefix, ".bin"), dtype=dtype, count=int(length[0]), offset=int(start[0]))
