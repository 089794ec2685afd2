"""Which side a document is on: train or held out, by the hash of its text.

Whole documents only. The choice is a function of (seed, text): it does not depend on files, order or workers, and two equal
texts are always on the same side, so an exact duplicate cannot leak from train into the held-out split.
"""

import hashlib

from data_prep.config import SplitConfig


def unit_hash(text: bytes, salt: str) -> float:
    """Returns a number in [0, 1) that is uniform over texts; each salt gives another one."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, key=salt.encode()).digest(), "little") / 2**64


def is_heldout(text: bytes, split: SplitConfig) -> bool:
    """Returns whether a document (UTF-8) belongs to the held-out split."""
    return unit_hash(text, f"heldout {split.seed}") < split.heldout_fraction
