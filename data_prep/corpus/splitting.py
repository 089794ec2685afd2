"""Which split a document belongs to, train or held out, by the hash of its text.

Whole documents only. The choice is a function of (seed, text). It does not depend on files, order or workers. Two equal
texts are always in the same split, so an exact duplicate cannot leak from train into the held-out split.
"""

import hashlib

from data_prep.config import SplitConfig


def unit_hash(text: bytes, salt: str) -> float:
    """Returns a number in [0, 1), uniform over texts and different for each salt."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, key=salt.encode()).digest(), "little") / 2**64


def is_heldout(text: bytes, split: SplitConfig) -> bool:
    """Returns whether a document (UTF-8) belongs to the held-out split."""
    return unit_hash(text, f"heldout {split.seed}") < split.heldout_fraction
