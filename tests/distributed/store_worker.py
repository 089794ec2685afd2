"""A rank of test_store.py: joins as every rank of a run does, exchanges something, and prints where it listens."""

import json
import os

import torch
import torch.distributed as dist

from ssa_pretrain.config import ParallelConfig
from ssa_pretrain.parallel.state import joined
from support.sockets import listeners

if __name__ == "__main__":
    with joined(ParallelConfig(), seed=1) as placement:
        total = torch.ones(3)
        dist.all_reduce(total, group=placement.groups.dp_cp)
        assert total.tolist() == [2.0] * 3
        print(json.dumps(sorted(listeners([os.getpid()]))))
        dist.barrier()
