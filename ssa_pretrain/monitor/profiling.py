"""Where a step's time goes: torch's profiler around chosen steps, and a table made of its trace.

`breakdown` is a pure function of a trace's events. Every kernel on the device belongs to one part, by its name and, for the optimizer, by the range it
was launched from. Communication is exposed where no other kernel runs beside it and hidden elsewhere; idle is when nothing runs. A trace without a
device (a CPU run) is judged by the operators' own times instead.

Not done: kernels of one part that run beside each other are counted twice in it; the profiler itself slows the host, so idle is an upper bound.
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

# (part, what a kernel's or operator's name holds), the first match counts.
PARTS: tuple[tuple[str, str], ...] = (
    (COMMUNICATION, r"nccl|^c10d::|gloo"),
    ("optimizer", r"multi_tensor|adam|l2norm|_foreach_"),
    ("attention, full", r"fmha|flash|sdpa|cudnn_generated|scaled_dot_product"),
    ("selection", r"^(block_means|softmax_sums|importance|top_k)_kernel"),
    (
        "attention, sparse",
        r"^(forward|dq|dkdv|portable_\w+|add_segments|bucket\w*|count_segments|segment|pack)_kernel|radix|sort|scan",
    ),
    ("gate and alignment", r"^(gate_\w+|sum_partials)_kernel|smooth_l1"),
    ("projection split and RoPE", r"^qkv_rope_|rotary|fused_rope"),
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
        span: from the first kernel's begin to the last one's end.
        parts: by name, communication left out.
        exposed, hidden: communication with nothing beside it, and beside other work.
        idle: time in the span when nothing runs.
    """

    span: float
    parts: dict[str, float]
    exposed: float
    hidden: float
    idle: float


def breakdown(events: Iterable[Mapping[str, Any]]) -> Breakdown:
    """Return where the time of a trace went.

    Args:
        events: `traceEvents` of a Chrome trace as torch.profiler writes it.
    """
    complete = [e for e in events if e.get("ph") == "X" and "dur" in e]
    kernels = [e for e in complete if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    launched = _ranges_of(complete) if kernels else {}
    pieces = [(e, float(e["ts"]), float(e["dur"])) for e in kernels] or list(_own_times(complete))
    if not pieces:
        return Breakdown(0.0, {}, 0.0, 0.0, 0.0)
    parts: dict[str, float] = {}
    work: list[tuple[float, float]] = []
    talk: list[tuple[float, float]] = []
    for event, begin, duration in pieces:
        correlation = event.get("args", {}).get("correlation")
        part = part_of(event["name"], in_optimizer=launched.get(correlation, False))
        (talk if part == COMMUNICATION else work).append((begin, begin + duration))
        if part != COMMUNICATION:
            parts[part] = parts.get(part, 0.0) + duration
    work, talk = _union(work), _union(talk)
    everything = _union(work + talk)
    span = everything[-1][1] - everything[0][0] if kernels else _length(everything)
    hidden = _length(work) + _length(talk) - _length(everything)
    return Breakdown(span, parts, _length(talk) - hidden, hidden, span - _length(everything))


def part_of(name: str, *, in_optimizer: bool = False) -> str:
    """Return the part that a kernel or operator belongs to.

    Args:
        name: as the trace has it.
        in_optimizer: whether it was launched within the optimizer's range, where only communication is something else.
    """
    found = next((part for part, pattern in PARTS if re.search(pattern, name, re.IGNORECASE)), OTHER)
    return "optimizer" if in_optimizer and found != COMMUNICATION else found


def table(found: Breakdown) -> str:
    """Return a breakdown as a markdown table, the largest part first."""
    rows = sorted(found.parts.items(), key=lambda item: -item[1])
    rows += [("communication, exposed", found.exposed), ("communication, hidden", found.hidden), ("idle", found.idle)]
    span = found.span or 1.0
    lines = ["| part | ms | of the step |", "|---|---|---|"]
    lines += [f"| {name} | {us / 1e3:.2f} | {us / span:.1%} |" for name, us in rows]
    return "\n".join([*lines, f"| **the step** | {found.span / 1e3:.2f} | |"]) + "\n"


def read_trace(path: Path) -> list[dict[str, Any]]:
    """Return the events of a trace file, packed or not."""
    opened = gzip.open(path, "rt") if path.suffix == ".gz" else path.open(encoding="utf-8")
    with opened as file:
        return json.load(file)["traceEvents"]


@contextmanager
def profiled(folder: Path, *, step: int, rank: int, memory: bool) -> Iterator[None]:
    """Profile what happens inside: trace, table and, on a GPU, a memory snapshot, into `folder`; waits for the device before and after.

    Args:
        folder: made if it does not exist.
        step: names the files.
        rank: likewise.
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


def _ranges_of(events: Sequence[Mapping[str, Any]]) -> dict[Any, bool]:
    """Return by correlation number whether the launch lies in the optimizer's range, on the thread that it names."""
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
    """Return each operator of a CPU trace with its begin and the time that none of its inner operators took."""
    threads: dict[Any, list[Mapping[str, Any]]] = {}
    for event in events:
        if event.get("cat") == "cpu_op":
            threads.setdefault((event.get("pid"), event.get("tid")), []).append(event)
    for found in threads.values():
        found.sort(key=lambda e: (float(e["ts"]), -float(e["dur"])))
        open_: list[list[Any]] = []  # [event, end, time of the inner ones]
        for event in [*found, {"ts": float("inf"), "dur": 0.0}]:
            while open_ and open_[-1][1] <= float(event["ts"]):
                inner, _, taken = open_.pop()
                yield inner, float(inner["ts"]), max(0.0, float(inner["dur"]) - taken)
            if open_:
                open_[-1][2] += float(event["dur"])
            open_.append([event, float(event["ts"]) + float(event["dur"]), 0.0])


def _union(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return spans in order, those that touch made one."""
    found: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def _length(spans: Iterable[tuple[float, float]]) -> float:
    return sum(end - begin for begin, end in spans)
