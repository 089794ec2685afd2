"""Times what tensor parallelism waits for, an all-gather and a reduce-scatter of hidden states, in several implementations, alone and beside a matrix product.

    PYTHONPATH=. torchrun --standalone --nproc-per-node 2 tests/benchmarks/collectives.py [--tokens 16384] [--hidden 2048] [--json FILE]

NCCL with different numbers of CTAs (megatron-core's defaults first), and torch's symmetric memory, whose copies take no multiprocessor. Each result
is checked: gathered values are equal, sums are as near to float64 as NCCL's. `beside` is how many times as long the product takes with the
collective on another stream, `both` the time until both are done, over the product's alone.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric

from ssa_pretrain.bench.timing import time_in_turns

ROUNDS, RUNS = 5, 20
# name -> (min_ctas, max_ctas, cga_cluster_size); None keeps NCCL's choice
NCCL = {
    "nccl": None,
    "nccl, 16 CTAs": (16, 16, 4),
    "nccl, 24 CTAs": (24, 24, 4),
    "nccl, 32 CTAs": (32, 32, 4),
    "nccl, 32 CTAs, no clusters": (32, 32, 0),
    "nccl, 64 CTAs": (64, 64, 4),
}
Exchange = Callable[[torch.Tensor], torch.Tensor]


def nccl_group(ctas: tuple[int, int, int] | None) -> dist.ProcessGroup:
    """Returns a group of all ranks with NCCL's number of CTAs."""
    if ctas is None:
        return dist.new_group()
    options = dist.ProcessGroupNCCL.Options()
    options.config.min_ctas, options.config.max_ctas, options.config.cga_cluster_size = ctas
    return dist.new_group(pg_options=options)


def nccl_exchanges(group: dist.ProcessGroup) -> tuple[Exchange, Exchange]:
    """Returns an all-gather and a reduce-scatter along the first dimension."""
    size = group.size()

    def gather(x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty((size * x.shape[0], *x.shape[1:]))
        dist.all_gather_into_tensor(out, x, group=group)
        return out

    def scatter(x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty((x.shape[0] // size, *x.shape[1:]))
        dist.reduce_scatter_tensor(out, x, group=group)
        return out

    return gather, scatter


def copy_exchanges(group: dist.ProcessGroup) -> tuple[Exchange, Exchange]:
    """Returns the same two by torch's copies through symmetric memory."""
    name, wait = group.group_name, torch.ops._c10d_functional.wait_tensor
    low = torch.ops.symm_mem
    return (
        lambda x: wait(low._low_contention_all_gather(x, name)),
        lambda x: wait(low._low_contention_reduce_scatter(x, "sum", name)),
    )


def own_exchanges(group: dist.ProcessGroup, gathered: torch.Tensor) -> tuple[Exchange, Exchange]:
    """Returns the same two by hand: a copy into a symmetric buffer, a barrier, reads from the peers, a barrier."""
    size, rank = group.size(), group.rank()
    buffer = symmetric.empty(gathered.shape, dtype=gathered.dtype, device=gathered.device)
    handle = symmetric.rendezvous(buffer, group.group_name)
    rows = gathered.shape[0] // size

    def peer(other: int, first: int) -> torch.Tensor:
        whole = handle.get_buffer(other, tuple(gathered.shape), gathered.dtype)
        return whole[first : first + rows]

    def gather(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(gathered)
        buffer[:rows].copy_(x)
        handle.barrier(channel=0)
        for step in range(size):
            other = (rank + step) % size
            out[other * rows : (other + 1) * rows].copy_(peer(other, 0))
        handle.barrier(channel=1)
        return out

    def scatter(x: torch.Tensor) -> torch.Tensor:
        buffer.copy_(x)
        handle.barrier(channel=0)
        out = x[rank * rows : (rank + 1) * rows]
        for step in range(1, size):
            out = out + peer((rank + step) % size, rank * rows)
        handle.barrier(channel=1)
        return out

    return gather, scatter


def microseconds(run: Callable[[], object]) -> float:
    """Returns the median over rounds of a run's mean time, the slowest rank's."""
    (timing,) = time_in_turns([run], rounds=ROUNDS, runs_per_turn=RUNS, warmup=RUNS)
    slowest = torch.tensor(timing.ms * 1e3, device="cuda")
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def beside(exchange: Callable[[], object], product: Callable[[], object]) -> tuple[float, float]:
    """Returns (time of the product beside the exchange, time until both are done), each over the product's alone."""
    side, alone = torch.cuda.Stream(), microseconds(product)
    taken = []

    def both() -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            exchange()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        product()
        last.record()
        taken.append((first, last))
        torch.cuda.current_stream().wait_stream(side)

    whole = microseconds(both)
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) * 1e3 for a, b in taken) / alone, whole / alone


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384, help="of a microbatch")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", device_id=torch.device("cuda", int(os.environ["LOCAL_RANK"])))
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    whole = torch.randn(given.tokens, given.hidden, device="cuda", dtype=torch.bfloat16)
    part = whole[: given.tokens // size].contiguous()
    weight = torch.randn(given.hidden, 2 * given.hidden, device="cuda", dtype=torch.bfloat16)
    exact = whole.double()
    dist.all_reduce(exact)
    exact = exact.chunk(size)[rank]
    groups = {name: nccl_group(ctas) for name, ctas in NCCL.items()}
    pairs = {name: nccl_exchanges(group) for name, group in groups.items()}
    makers = {
        "torch's copies": lambda: copy_exchanges(groups["nccl"]),
        "copies by hand": lambda: own_exchanges(groups["nccl"], whole),
    }
    wanted, found, nearest = pairs["nccl"][0](part), [], None
    moved = whole.numel() * whole.element_size() * (size - 1) / size
    for name in (*pairs, *makers):
        try:
            gather, scatter = pairs.get(name) or makers[name]()
            assert torch.equal(gather(part), wanted), f"{name}: gathered values differ"
            error = float((scatter(whole).double() - exact).norm() / exact.norm())
            nearest = nearest or error
            assert error <= 1.1 * nearest, f"{name}: sums are off by {error:.1e}, NCCL's by {nearest:.1e}"
            row = {"name": name}
            for what, run in (
                ("all-gather", lambda gather=gather: gather(part)),
                ("reduce-scatter", lambda scatter=scatter: scatter(whole)),
            ):
                taken = microseconds(run)
                slower, both = beside(run, lambda: whole @ weight)
                row |= {what: {"us": taken, "gb_per_second": moved / taken / 1e3, "beside": slower, "both": both}}
        except (RuntimeError, AssertionError, ValueError) as error:
            row = {"name": name, "error": str(error).partition("\n")[0][:160]}
        found.append(row)
        if rank == 0:
            print(line(row), flush=True)
    if rank == 0 and given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    dist.destroy_process_group()


def line(row: dict) -> str:
    """Returns a row of the table."""
    if "error" in row:
        return f"| {row['name']} | {row['error']} |"
    cells = [
        f"{row[what]['us']:.0f} us, {row[what]['gb_per_second']:.0f} GB/s | {row[what]['beside']:.2f} | {row[what]['both']:.2f}"
        for what in ("all-gather", "reduce-scatter")
    ]
    return f"| {row['name']} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
