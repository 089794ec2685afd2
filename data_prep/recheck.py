"""Documents encoded again: text as it lies on the disk now, against the tokens of a finished dataset.

Checksums show that files are what was written. Only the text shows that what was written was right: the beginnings of shards spread
over the plan are read, split and encoded by `tokenizers` itself, and compared with the documents that the dataset has for them. Needs
out/work and unchanged input; where either is gone nothing is compared, and the verdict says so.
"""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.binaries import with_suffix
from data_prep.config import SplitConfig
from data_prep.errors import InputError
from data_prep.files import read_json
from data_prep.readers import Piece, read_piece
from data_prep.splitting import is_heldout
from data_prep.tokenizer.encoding import Encoder, Vocabulary
from ssa_pretrain.data.indexed_format import HEADER, SPLITS, Manifest, ShardInfo, token_dtype

SHARDS, DOCUMENT_BYTES = 20, 100_000


def recheck(manifest: Manifest, documents: int) -> tuple[list[str], str]:
    """Returns the documents whose tokens are not those of their text, and a sentence about how many were compared."""
    plan = read_json(manifest.root / "work" / "plan.json")
    if not isinstance(plan, dict) or not plan.get("shards"):
        return [], "no document was encoded again: out/work is gone"
    places, inputs = _places(manifest), manifest.details.get("inputs")
    shards = [entry for entry in plan["shards"] if entry["stem"] in places]
    # Since a run with other settings was refused or begun, the plan and the records may be its.
    shards = [entry for entry in shards if inputs is None or inputs.get(entry["stem"]) == entry["sha256"]]
    if not shards:
        return [], "no document was encoded again: out/work is another run's; the dataset's own command makes it anew"
    sums = read_json(manifest.root / "work" / "inputs.json") or {}
    shards = [entry for entry in shards if all(_unchanged(piece, sums) for piece in entry["pieces"])]
    if not shards:
        return [], "no document was encoded again: the text is gone or has changed"
    chosen = shards[:: max(1, len(shards) // SHARDS)][:SHARDS]
    encoder, found, compared = _encoder(manifest), [], 0
    for entry in chosen:
        problem, count = _compare(manifest, encoder, entry, places[entry["stem"]], max(1, documents // len(chosen)))
        found += problem
        compared += count
    return found, f"{compared} documents of {len(chosen)} shards, encoded again, are as in the dataset"


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
    """Returns for each shard, by split, the file that holds it and its first document there."""
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


def _unchanged(piece: dict[str, Any], sums: dict[str, Any]) -> bool:
    try:
        stat = Path(piece["path"]).stat()
    except OSError:
        return False
    return sums.get(piece["path"], [])[:2] == [stat.st_size, stat.st_mtime_ns]


def _compare(
    manifest: Manifest, encoder: Encoder, entry: dict[str, Any], place: dict[str, tuple[ShardInfo, int]], count: int
) -> tuple[list[str], int]:
    split = SplitConfig(**manifest.details["split"])
    at = {name: first for name, (_, first) in place.items()}
    compared = 0
    try:
        for text, raw in islice(read_piece(Piece(**entry["pieces"][0]), lambda _: None), count):
            if not raw or raw.isspace():
                continue
            side = "heldout" if is_heldout(raw, split) else "train"
            if side not in place:
                return [f"{side}: shard {entry['stem']} has a document that the dataset lacks, {text[:40]!r}"], compared
            if len(raw) > DOCUMENT_BYTES:
                return [], compared  # to know where the next begins it would have to be encoded
            for ids in encoder.encode([text]):
                if not np.array_equal(ids, _document(manifest, place[side][0], at[side])):
                    return [
                        f"{place[side][0].prefix}: document {at[side]} is not the text that begins {text[:40]!r} (shard "
                        f"{entry['stem']}, {entry['pieces'][0]['path']})"
                    ], compared
                at[side] += 1
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
