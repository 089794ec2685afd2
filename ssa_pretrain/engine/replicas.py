"""Compares the copies of the weights that data ranks hold, by hash, during training, and names the rank whose copy differs.

A memory or processor error changes weights silently. Data and context ranks hold equal copies, bit for bit, so comparing them finds it. In the first
step of a process and every `training.replica_check_interval` steps, between the backward and the update, each rank hashes every weight on its device,

    hash = sum over elements i of bits_i * w_i    mod 2**64,

where `bits` are the element's bits read as an integer and the w are fixed odd numbers without a pattern. Integer sums do not depend on their order,
so equal copies have equal hashes. One changed element changes the hash for certain, because odd factors are invertible mod 2**64. Several changed
elements cancel by chance only. Two small reductions follow; the host reads their outcome with the step's results and waits for nothing. No weight,
gradient or loss is changed.

What it cannot see. ZeRO-3 and a single data rank hold no copies, so nothing is compared. Where each step copies the weights from fp32 ones
(bf16), or gathers them from the rank that updates them (distributed optimizer, ZeRO 1 and 2), a wrong weight lasts for one step, so only the steps
that are compared find it; an error in the fp32 weights or moments that only one rank holds reaches all copies alike. With two copies, both
ranks are named. The copies are also compared before each save, so that no checkpoint holds a difference.

docs/launch.md has the remedy.
"""

import socket
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ssa_pretrain.errors import ReplicaError

if TYPE_CHECKING:
    from ssa_pretrain.parallel.state import Placement

CHUNKS = {"cpu": 2**15, "cuda": 2**22}  # elements hashed at once as int64: they fit a CPU's cache, or fill a GPU
MULTIPLIER = 0x9E3779B97F4A7C15  # odd; 2**64 divided by the golden ratio
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per element
KEPT = 2  # comparisons whose hashes are kept: one step may be queued behind the one that is read
MAX_NAMED = 3  # weights in the message


class ReplicaCheck:
    """The comparisons of one rank.

    Args:
        interval: steps between comparisons; 0: none.
        placement: this process's coordinates.
        sharded: whether data ranks hold shards, so that there is nothing to compare.
    """

    def __init__(self, interval: int, placement: "Placement", *, sharded: bool = False) -> None:
        self._group = placement.groups.dp_cp
        self._interval = 0 if sharded or self._group.size() == 1 else interval
        self._hashes: dict[int, tuple[list[str], Tensor]] = {}  # of the newest comparisons, by step
        self._equal_after: int | None = None

    def is_due(self, step: int) -> bool:
        """Returns whether the weights after `step` updates are compared."""
        return bool(self._interval) and (not self._hashes or step % self._interval == 0)

    def compare(self, named: Iterable[tuple[str, Tensor]], step: int) -> Tensor | None:
        """Returns in how many weights the copies of any group differ at most, int64 scalar on the device; None if no comparison is due.

        Every rank calls it. Nothing is read on the host.

        Args:
            named: this rank's weights with their names, the same on every rank of a group.
            step: updates that the weights have seen.
        """
        return self._compare(named, step) if self.is_due(step) else None

    def require_equal_to_save(self, named: Iterable[tuple[str, Tensor]], step: int) -> None:
        """Compares the copies before a checkpoint of them is saved, due or not, and waits for the outcome; every rank calls it.

        Raises:
            ReplicaError: on every rank, if copies differ.
        """
        if self._interval:
            self.require_equal(int(self._compare(named, step)), step)

    @torch.no_grad()
    def _compare(self, named: Iterable[tuple[str, Tensor]], step: int) -> Tensor:
        names, tensors = zip(*named, strict=True)
        own = bit_hashes(tensors)
        self._hashes[step] = (list(names), own)
        if len(self._hashes) > KEPT:
            del self._hashes[min(self._hashes)]
        # The largest hash, and the complement of the smallest: max(~h) is ~min(h).
        extremes = torch.cat([own, ~own])
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self._group)
        largest, smallest = extremes[: len(own)], ~extremes[len(own) :]
        differing = (largest != smallest).sum()
        dist.all_reduce(differing, op=dist.ReduceOp.MAX)  # all ranks must learn of it
        return differing

    def require_equal(self, differing: int, step: int) -> None:
        """Judges the outcome of a comparison; every rank calls it with the same outcome.

        Args:
            differing: what `compare` returned.
            step: updates that the weights had seen.

        Raises:
            ReplicaError: on every rank with the same text, if copies differ.
        """
        if not differing:
            self._equal_after = step
            return
        names, own = self._hashes[step]
        hashes = [torch.empty_like(own) for _ in range(self._group.size())]
        dist.all_gather(hashes, own, group=self._group)
        ranks = dist.get_process_group_ranks(self._group)
        hosts: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(hosts, socket.gethostname())
        described = describe(names, [h.tolist() for h in hashes], [f"rank {r} ({hosts[r]})" for r in ranks])
        found: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(found, described)
        groups = "; ".join(dict.fromkeys(text for text in found if text))
        before = "" if self._equal_after is None else f"; they were equal after step {self._equal_after}"
        raise ReplicaError(
            f"after step {step} data ranks hold different weights: {groups}{before}. Copies are compared before each save, so no checkpoint holds the "
            "difference: test the memory of that machine, and run the same command without it to resume"
        )


def bit_hashes(tensors: Sequence[Tensor]) -> Tensor:
    """Returns the hash of each tensor's bits, int64 [len(tensors)] on their device; products and sums wrap around."""
    device = tensors[0].device
    chunk = min(CHUNKS[device.type], max(tensor.numel() for tensor in tensors))
    factors = odd_numbers(chunk, device)
    hashes = torch.zeros(len(tensors), dtype=torch.int64, device=device)
    for tensor, total in zip(tensors, hashes.unbind(), strict=True):
        bits = tensor.detach().reshape(-1)
        bits = bits.view(BITS[bits.element_size()])
        for number, first in enumerate(range(0, bits.numel(), chunk)):
            part = bits[first : first + chunk].to(torch.int64)
            total += (part * factors[: part.numel()]).sum() * _signed(pow(MULTIPLIER, number, 2**64))
    return hashes


def odd_numbers(count: int, device: torch.device) -> Tensor:
    """Returns fixed odd numbers without a pattern, int64 [count]."""
    mixed = torch.arange(1, count + 1, dtype=torch.int64, device=device) * _signed(MULTIPLIER)
    mixed = (mixed ^ (mixed >> 29)) * _signed(MULTIPLIER)
    return (mixed ^ (mixed >> 32)) | 1


def _signed(number: int) -> int:
    """Returns the int64 with the bits of a number below 2**64."""
    return number - 2**64 if number >= 2**63 else number


def describe(names: Sequence[str], hashes: Sequence[Sequence[int]], ranks: Sequence[str]) -> str:
    """Returns which ranks of a group differ from the majority, and in which weights; empty if none does.

    Args:
        names: of the weights.
        hashes: each rank's, in the order of `names`.
        ranks: each rank's name, in the order of `hashes`.
    """
    wrong: dict[str, list[str]] = {}
    undecided: list[str] = []
    for name, column in zip(names, zip(*hashes, strict=True), strict=True):
        (usual, count), *others = Counter(column).most_common(2)
        if not others:
            continue
        if others[0][1] == count:
            undecided.append(name)
            continue
        for rank, value in zip(ranks, column, strict=True):
            if value != usual:
                wrong.setdefault(rank, []).append(name)
    texts = [f"{rank} differs from the others in {_listed(weights)}" for rank, weights in wrong.items()]
    if undecided:
        texts.append(f"{_joined(ranks)} differ in {_listed(undecided)}, and their number does not show which is right")
    return ", ".join(texts)


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _joined(ranks: Sequence[str]) -> str:
    return " and ".join(ranks) if len(ranks) < 3 else f"{', '.join(ranks[:-1])} and {ranks[-1]}"
