"""The doctor's checks between the ranks of a job: `torchrun … -m ssa_pretrain.doctor`. Every rank calls every function.

The ranks meet over gloo, so that a broken NCCL does not hide the other findings; NCCL is then tried by itself with a short timeout.
"""

import os
import socket
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ssa_pretrain.doctor.findings import EXPECTED, Finding, fail, ok, warn
from ssa_pretrain.monitor.environment import versions
from ssa_pretrain.run_folder import marker_is_visible, write_marker

MEET_SECONDS = 120
MOST_SKEW, USUAL_SKEW = 60.0, 1.0
ROUNDS = 5  # of the exchange of clocks; the quickest counts
NUMBERS = 2**20  # of the collective that is tried


def join() -> None:
    """Joins the ranks; raises `dist.DistError` or RuntimeError if they do not meet."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=MEET_SECONDS))


def gather(findings: list[Finding]) -> list[Finding]:
    """Returns the findings of local rank 0 of every node, on every rank."""
    every: list[list[Finding]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, findings)
    return [one for each in every for one in each]


def checks(folder: Path) -> list[Finding]:
    """Returns what the ranks find together, the same on every rank."""
    return [*same_versions(), *shared_folder(folder), *clocks(), *collective()]


def same_versions() -> list[Finding]:
    """Whether all nodes have the same libraries; a run refuses to start otherwise."""
    every: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, versions() | {"host": socket.gethostname()})
    first = every[0]
    found = []
    for name in {name for one in every for name in one} - {"host"}:
        others = {one["host"]: one.get(name) for one in every if one.get(name) != first.get(name)}
        if others:
            host, value = next(iter(others.items()))
            text = f"{name} {value} on {host}, and {first.get(name)} on {first['host']}"
            found.append(fail("same versions", text, "use one environment, on shared storage or in an image"))
    return found or [ok("same versions", f"on all {len({one['host'] for one in every})} hosts")]


def shared_folder(folder: Path) -> list[Finding]:
    """Whether all ranks see the same `output_dir`."""
    marker: list[str | None] = [None]
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        marker = [write_marker(folder)]
    dist.broadcast_object_list(marker, src=0)
    sees = [marker_is_visible(folder, str(marker[0])), socket.gethostname()]
    every: list[list] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, sees)
    if dist.get_rank() == 0:
        (folder / str(marker[0])).unlink(missing_ok=True)
    blind = sorted({host for visible, host in every if not visible})
    if blind:
        text = f"{folder} of rank 0 is not seen on {', '.join(blind[:4])}"
        return [fail("shared storage", text, "give an output_dir on storage that all nodes share")]
    return [ok("shared storage", f"{folder} is the same folder for all {len(every)} ranks")]


def clocks() -> list[Finding]:
    """The difference between the nodes' clocks, as far as an exchange over the network can tell."""
    best: tuple[float, list] | None = None
    for _ in range(ROUNDS):
        dist.barrier()
        begin = time.monotonic()
        every: list = [None] * dist.get_world_size()
        dist.all_gather_object(every, (time.time(), socket.gethostname()))
        seconds = [time.monotonic() - begin]
        dist.broadcast_object_list(seconds, src=0)  # all ranks choose the same round
        if best is None or seconds[0] < best[0]:
            best = (seconds[0], every)
    assert best is not None
    error, every = best
    (early, _), (late, host) = min(every), max(every)
    skew = late - early
    text = f"differ by {skew:.3f} s at most, measured to {error:.3f} s"
    if skew - error > USUAL_SKEW:
        much = "logs cannot be compared" if skew < MOST_SKEW else "certificates may be refused"
        return [warn("clocks", f"{text}; {host} is ahead, and {much}", "start chrony on all nodes")]
    return [ok("clocks", text)]


def collective() -> list[Finding]:
    """A sum over all ranks, over NCCL if there are GPUs: whether it ends, is right, and how long it takes."""
    backend, device = "gloo", torch.device("cpu")
    if torch.cuda.is_available():
        backend, device = "nccl", torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    try:
        group = dist.new_group(backend=backend, timeout=timedelta(seconds=MEET_SECONDS))
        values = torch.ones(NUMBERS, device=device)
        dist.all_reduce(values, group=group)  # connects
        values.fill_(1.0)
        begin = time.monotonic()
        dist.all_reduce(values, group=group)
        right = bool((values == dist.get_world_size()).all().item())
        seconds = time.monotonic() - begin
    except EXPECTED as error:
        text = " ".join(str(error).split())[:160]
        remedy = "run again with NCCL_DEBUG=INFO; NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME names the interface"
        return [fail("collective", f"{backend}: {text}", remedy)]
    if not right:
        return [fail("collective", f"{backend}: the sum over ranks is wrong", "take the nodes out one by one")]
    text = f"{backend}: {NUMBERS * 4 / 2**20:.0f} MiB over {dist.get_world_size()} ranks in {seconds * 1e3:.1f} ms"
    return [ok("collective", text)]
