"""Which documents are held out: a uniform choice that depends only on the text and the seed."""

import math

from data_prep.config import SplitConfig
from data_prep.corpus.splitting import is_heldout


def test_share_is_the_fraction_within_four_standard_deviations():
    texts = [f"document {n}".encode() for n in range(20_000)]
    fraction = 0.1
    held = sum(is_heldout(text, SplitConfig(heldout_fraction=fraction)) for text in texts)
    assert abs(held - 2000) < 4 * math.sqrt(20_000 * fraction * (1 - fraction))


def test_larger_fraction_keeps_what_was_held_out():
    texts = [f"document {n}".encode() for n in range(2000)]
    small = {t for t in texts if is_heldout(t, SplitConfig(heldout_fraction=0.05))}
    large = {t for t in texts if is_heldout(t, SplitConfig(heldout_fraction=0.2))}
    assert small < large


def test_seed_holds_out_other_documents():
    texts = [f"document {n}".encode() for n in range(2000)]
    sides = [{t for t in texts if is_heldout(t, SplitConfig(heldout_fraction=0.1, seed=seed))} for seed in (0, 1)]
    # Independent choices of 10 % share 1 % of 2000 texts on average.
    assert len(sides[0] & sides[1]) < 50 < min(map(len, sides))


def test_everything_is_held_out_at_one():
    assert all(is_heldout(f"{n}".encode(), SplitConfig(heldout_fraction=1.0)) for n in range(1000))


def test_nothing_is_held_out_at_zero():
    assert not any(is_heldout(f"{n}".encode(), SplitConfig(heldout_fraction=0.0)) for n in range(1000))
