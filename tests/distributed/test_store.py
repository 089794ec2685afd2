"""Ranks that meet on the loopback, as under DeepSpeed's launcher, listen nowhere else: neither rank 0's store nor gloo."""

import json
from pathlib import Path

from support.processes import ranks, run_ranks
from support.sockets import beyond_loopback


def test_ranks_listen_on_the_loopback_only():
    ended = run_ranks([str(Path(__file__).parent / "store_worker.py")], ranks(2), timeout=120)
    assert [one.code for one in ended] == [0, 0], ended
    found = [set(json.loads(one.stdout)) for one in ended]
    assert len(found[0]) > len(found[1]) > 0, "rank 0 has the store and gloo's sockets, rank 1 the latter"
    assert beyond_loopback(found[0] | found[1]) == set()
