"""Profiles of single steps: torch's profiler, and a table of times by category computed from its trace.

`breakdown` is a pure function of a trace's events. Every kernel on the device belongs to one category, by its name and, for the optimizer, by
the range it was launched from. Communication is hidden while another kernel runs, and exposed otherwise. The device is idle when nothing runs.
A trace without a device (a CPU run) is broken down by the operators' own times instead.

Limits: concurrent kernels of one category are counted twice. The profiler slows the host, so idle time is an upper bound.
"""

import gzip
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OPTIMIZER_RANGE = "ssa_pretrain: optimizer"
COMMUNICATION, OTHER = "communication", "other"

# (category, pattern of a kernel's or operator's name); the first match counts.
CATEGORIES: tuple[tuple[str, str], ...] = (
    (COMMUNICATION, r"nccl|^c10d::|gloo"),
    ("optimizer", r"multi_tensor|adam|l2norm|_foreach_"),
    ("attention, full", r"fmha|flash|sdpa|cudnn_generated|scaled_dot_product|^(merge|span_sums)_kernel"),
    ("trained scorer", r"^(log_block_mass|log_block_sums|terms|ratio_sums|query_gradient|key_gradient)_kernel"),
    ("attention, compressed and window", r"^(range_\w+|means|means_backward)_kernel"),
    ("selection", r"^(block_means|long_tiles|softmax_sums|importance|top_k)_kernel"),
    (
        "attention, sparse",
        r"^(forward|dq|dkdv|portable_\w+|add_segments|bucket\w*|count_segments|segment|pack)_kernel|radix|sort|scan",
    ),
    ("gate and alignment", r"^(gated?_\w+|sampled_\w+|sum_partials)_kernel|smooth_l1"),
    ("projection split and RoPE", r"^qkv_rope_|^key_convolution_|rotary|fused_rope"),
    ("SwiGLU", r"swiglu|silu"),
    ("norms", r"rms_?norm|layer_?norm|ln_(fwd|bwd)|norm_(fwd|bwd)"),
    ("cross entropy", r"cross_entropy|log_softmax|logsumexp"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|cublas|^aten::(mm|bmm|addmm|addmm_|matmul|linear)$"),
    ("embedding", r"embedding|indexing_backward|index_select"),
    ("copies and fills", r"mem(cpy|set)|^aten::(copy_|fill_|zero_|clone)$"),
)


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Times in microseconds.

    Attributes:
        total: from the start of the first kernel to the end of the last.
        categories: time by category, without communication.
        exposed, hidden: communication without and with concurrent work.
        idle: part of the total in which nothing runs.
    """

    total: float
    categories: dict[str, float]
    exposed: float
    hidden: float
    idle: float


def breakdown(events: Iterable[Mapping[str, Any]]) -> Breakdown:
    """Returns the time of a trace by category.

    Args:
        events: `traceEvents` of a Chrome trace as torch.profiler writes it.
    """
    complete = [e for e in events if e.get("ph") == "X" and "dur" in e]
    kernels = [e for e in complete if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    launched = _launched_in_optimizer(complete) if kernels else {}
    intervals = [(e, float(e["ts"]), float(e["dur"])) for e in kernels] or list(_own_times(complete))
    if not intervals:
        return Breakdown(0.0, {}, 0.0, 0.0, 0.0)
    categories: dict[str, float] = {}
    work: list[tuple[float, float]] = []
    communication: list[tuple[float, float]] = []
    for event, begin, duration in intervals:
        correlation = event.get("args", {}).get("correlation")
        category = category_of(event["name"], in_optimizer=launched.get(correlation, False))
        if category == COMMUNICATION:
            communication.append((begin, begin + duration))
        else:
            work.append((begin, begin + duration))
            categories[category] = categories.get(category, 0.0) + duration
    work, communication = _union(work), _union(communication)
    busy = _union(work + communication)
    total = busy[-1][1] - busy[0][0] if kernels else _length(busy)
    hidden = _length(work) + _length(communication) - _length(busy)
    return Breakdown(total, categories, _length(communication) - hidden, hidden, total - _length(busy))


def category_of(name: str, *, in_optimizer: bool = False) -> str:
    """Returns the category of a kernel or operator.

    Args:
        name: as in the trace.
        in_optimizer: whether it was launched within the optimizer's range; everything except communication is then the optimizer.
    """
    found = next((category for category, pattern in CATEGORIES if re.search(pattern, name, re.IGNORECASE)), OTHER)
    return "optimizer" if in_optimizer and found != COMMUNICATION else found


def table(found: Breakdown) -> str:
    """Returns a breakdown as a markdown table, the largest category first."""
    rows = sorted(found.categories.items(), key=lambda item: -item[1])
    rows += [("communication, exposed", found.exposed), ("communication, hidden", found.hidden), ("idle", found.idle)]
    total = found.total or 1.0
    lines = ["| category | ms | share of the step |", "|---|---|---|"]
    lines += [f"| {name} | {us / 1e3:.2f} | {us / total:.1%} |" for name, us in rows]
    return "\n".join([*lines, f"| **step** | {found.total / 1e3:.2f} | |"]) + "\n"


def read_trace(path: Path) -> list[dict[str, Any]]:
    """Returns the events of a trace file, compressed or not."""
    opened = gzip.open(path, "rt") if path.suffix == ".gz" else path.open(encoding="utf-8")
    with opened as file:
        return json.load(file)["traceEvents"]


@contextmanager
def profiled(folder: Path, *, step: int, rank: int, memory: bool) -> Iterator[None]:
    """Profiles the code inside the context. Waits for the device before and after.

    Args:
        folder: for the trace, the table and, on a GPU, the memory snapshot; created if it does not exist.
        step: used in file names.
        rank: used in file names.
        memory: also record every allocation (open the snapshot at pytorch.org/memory_viz).
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"step_{step}.rank_{rank}"
    if on_gpu:
        torch.cuda.synchronize()
    if on_gpu and memory:
        torch.cuda.memory._record_memory_history(max_entries=200_000)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    try:
        with profile(activities=activities, record_shapes=False) as profiler:
            yield
            if on_gpu:
                torch.cuda.synchronize()
        if on_gpu and memory:
            torch.cuda.memory._dump_snapshot(f"{stem}.memory.pickle")
    finally:
        if on_gpu and memory:
            torch.cuda.memory._record_memory_history(enabled=None)
    trace = Path(f"{stem}.trace.json.gz")
    profiler.export_chrome_trace(str(trace))
    Path(f"{stem}.md").write_text(table(breakdown(read_trace(trace))), encoding="utf-8")


def _launched_in_optimizer(events: Sequence[Mapping[str, Any]]) -> dict[Any, bool]:
    """Returns by correlation number whether a launch lies in the optimizer's range on the same thread."""
    ranges = [
        (e.get("tid"), float(e["ts"]), float(e["ts"]) + float(e["dur"]))
        for e in events
        if e.get("cat") == "user_annotation" and e["name"] == OPTIMIZER_RANGE
    ]
    found = {}
    for event in events:
        correlation = event.get("args", {}).get("correlation")
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and correlation is not None:
            at = float(event["ts"])
            found[correlation] = any(event.get("tid") == tid and begin <= at < end for tid, begin, end in ranges)
    return found


def _own_times(events: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], float, float]]:
    """Yields each operator of a CPU trace with its start and its time without the operators inside it."""
    threads: dict[Any, list[Mapping[str, Any]]] = {}
    for event in events:
        if event.get("cat") == "cpu_op":
            threads.setdefault((event.get("pid"), event.get("tid")), []).append(event)
    for operators in threads.values():
        operators.sort(key=lambda e: (float(e["ts"]), -float(e["dur"])))
        stack: list[list[Any]] = []  # [event, end, time of its inner operators]
        for event in [*operators, {"ts": float("inf"), "dur": 0.0}]:
            while stack and stack[-1][1] <= float(event["ts"]):
                ended, _, inner = stack.pop()
                yield ended, float(ended["ts"]), max(0.0, float(ended["dur"]) - inner)
            if stack:
                stack[-1][2] += float(event["dur"])
            stack.append([event, float(event["ts"]) + float(event["dur"]), 0.0])


def _union(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns sorted, disjoint intervals: those that touch are merged."""
    merged: list[tuple[float, float]] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def _length(intervals: Iterable[tuple[float, float]]) -> float:
    return sum(end - begin for begin, end in intervals)
