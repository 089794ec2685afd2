"""Communication that a step waits for, by part, from a trace of the device.

Source: the events of torch.profiler's Chrome trace. A part is a kind of collective (the name of NCCL's kernel), its direction and its stream, of
which each process group has one. The direction comes from the thread that launched the kernel: autograd's backward has threads of its own. A part is
exposed while no other kernel runs. Where two collectives wait together, the one that began first counts.

Not seen: what a collective would take if no rank were late. A kernel's time includes waiting for the other ranks.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ssa_pretrain.monitor.profiling import COMMUNICATION, category_of

KINDS = {
    "AllGather": "all-gather",
    "ReduceScatter": "reduce-scatter",
    "AllReduce": "all-reduce",
    "SendRecv": "send and receive",
    "Broadcast": "broadcast",
}


@dataclass(slots=True)
class Part:
    """Communication of one kind, in milliseconds.

    Attributes:
        kind: of collective.
        direction: "forward" (and the optimizer, which runs in the same thread) or "backward".
        stream: its number in the trace.
        calls: kernels.
        busy, exposed: their time, and the part of it in which nothing else runs.
    """

    kind: str
    direction: str
    stream: str
    calls: int = 0
    busy: float = 0.0
    exposed: float = 0.0


def parts(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the parts of a step's communication as dicts, the most exposed first; empty for a trace without a device.

    Args:
        events: `traceEvents` of a Chrome trace.
    """
    complete = [e for e in events if e.get("ph") == "X" and "dur" in e]
    kernels = sorted((e for e in complete if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")), key=_begin)
    launches = sorted((e for e in complete if e.get("cat") in ("cuda_runtime", "cuda_driver")), key=_begin)
    threads = {e["args"]["correlation"]: e.get("tid") for e in launches if "correlation" in e.get("args", {})}
    forward = launches[0].get("tid") if launches else None
    is_communication = [category_of(e["name"]) == COMMUNICATION for e in kernels]
    covered = _Covered([e for e, sent in zip(kernels, is_communication, strict=True) if not sent])
    found: dict[tuple[str, str, str], Part] = {}
    end_of_last = float("-inf")
    for event in (e for e, sent in zip(kernels, is_communication, strict=True) if sent):
        thread = threads.get(event.get("args", {}).get("correlation"), forward)
        key = (_kind(event["name"]), "forward" if thread == forward else "backward", str(event.get("tid", "")))
        part = found.setdefault(key, Part(*key))
        begin, end = _begin(event), _begin(event) + float(event["dur"])
        part.calls += 1
        part.busy += (end - begin) / 1e3
        part.exposed += covered.free(max(begin, end_of_last), end) / 1e3
        end_of_last = max(end_of_last, end)
    return [asdict(part) for part in sorted(found.values(), key=lambda part: -part.exposed)]


class _Covered:
    """The times in which kernels run that are not communication."""

    def __init__(self, kernels: list[Mapping[str, Any]]) -> None:
        self.spans: list[list[float]] = []
        for event in kernels:
            begin, end = _begin(event), _begin(event) + float(event["dur"])
            if self.spans and begin <= self.spans[-1][1]:
                self.spans[-1][1] = max(self.spans[-1][1], end)
            else:
                self.spans.append([begin, end])
        self.place = 0

    def free(self, begin: float, end: float) -> float:
        """Returns how much of a span is not covered; later calls have later beginnings."""
        while self.place < len(self.spans) and self.spans[self.place][1] <= begin:
            self.place += 1
        free, index = max(0.0, end - begin), self.place
        while index < len(self.spans) and self.spans[index][0] < end:
            free -= max(0.0, min(end, self.spans[index][1]) - max(begin, self.spans[index][0]))
            index += 1
        return max(0.0, free)


def _begin(event: Mapping[str, Any]) -> float:
    return float(event["ts"])


def _kind(name: str) -> str:
    return next((kind for word, kind in KINDS.items() if word in name), name[:40])
