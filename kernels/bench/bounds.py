"""What limits each operator: its measured time beside the floors set by device memory, L2, tensor cores and exponentials.

Work is counted from the mathematics, for the average query: half a row of keys, top_k * block_size chosen keys, half a row of block means.
A floor is work divided by a rate. The largest floor is the limit, and floor / time tells how close the operator comes to it. Device memory
counts each byte that has to move once. L2 counts gathers: every chosen block of K and V for each (token, kv head), and in dK/dV also Q and
dO for each block. The rates of device memory and tensor cores are measured in the same run, as a copy and a matrix product. Those of L2 and
exponentials are the card's (H100 SXM and H200).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend

from ssa_kernels import gate_and_align

from .cases import Problem
from .shapes import BLOCK_SIZE, TOP_K, Shape
from .timing import median_ms, repetitions_for

# Gathers of 16-key blocks were measured at 9.4 TB/s, 92% of the L2's output according to ncu. Neighbouring tokens that choose the same block
# find it in the L1, so a gather may exceed this rate.
L2_BYTES_PER_SECOND = 10.3e12
# 16 per clock and multiprocessor, 1.98 GHz.
EXPONENTIALS_PER_SECOND = 132 * 16 * 1.98e9


@dataclass(frozen=True, slots=True)
class Stage:
    """One operator's time and work."""

    name: str
    ms: float
    flops: float
    memory_bytes: float
    l2_bytes: float
    exponentials: float
    floors: dict[str, float]  # in ms, by what sets them

    @property
    def binds(self) -> str:
        """What sets the largest floor and so limits the operator."""
        return max(self.floors, key=self.floors.get)

    def as_record(self) -> dict[str, float | str]:
        """Returns the stage as a line of bounds.csv."""
        floors = {f"floor_{name}_ms": value for name, value in self.floors.items()}
        work = {
            "flops": self.flops,
            "memory_bytes": self.memory_bytes,
            "l2_bytes": self.l2_bytes,
            "exponentials": self.exponentials,
        }
        return {
            "name": self.name,
            "ms": self.ms,
            **work,
            **floors,
            "binds": self.binds,
            "share": self.floors[self.binds] / self.ms,
        }


def measure(shape: Shape, copy: float, matmul: float) -> list[Stage]:
    """Returns the stages of one ssa layer at this shape, each timed separately."""
    problem = Problem(shape)
    tokens, heads, kv_heads, head_dim = shape.tokens, shape.heads, shape.kv_heads, shape.head_dim
    q_bytes, kv_bytes, lse_bytes = problem.q.nbytes, 2 * problem.k.nbytes, 4 * tokens * heads
    pairs_full = tokens * heads * shape.row_length / 2
    pairs_sparse = tokens * heads * min(TOP_K * BLOCK_SIZE, shape.row_length / 2)
    pairs_selection = pairs_full / BLOCK_SIZE
    gathered = tokens * kv_heads * TOP_K * BLOCK_SIZE * head_dim * 2 * 2
    # Q and dO of a group's heads, per (token, kv head, chosen block).
    gathered_again = tokens * TOP_K * heads * head_dim * 2 * 2
    index_bytes = tokens * kv_heads * TOP_K * 4

    leaves = (problem.q, problem.k, problem.v)
    indices = problem.choose()
    sparse, full = problem.sparse(indices), problem.sdpa(SDPBackend.CUDNN_ATTENTION)
    logits = torch.randn(tokens, heads, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    streams = [x.detach().requires_grad_() for x in (full, sparse)] + [logits]
    aligned = gate_and_align(*streams, main="full")
    grads = (problem.grad, torch.ones((), device="cuda"))

    def back(out: torch.Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(out, leaves, problem.grad, retain_graph=True)

    # name, call, flops, device memory, L2, exponentials
    rows = [
        ("selection", problem.choose, 4 * head_dim * pairs_selection, 2 * q_bytes + kv_bytes / 2 + index_bytes, 0.0, 2 * pairs_selection),
        ("sparse fwd", lambda: problem.sparse(indices), 4 * head_dim * pairs_sparse, 2 * q_bytes + kv_bytes + index_bytes + lse_bytes, gathered, pairs_sparse),
        ("sparse bwd", back(sparse), 10 * head_dim * pairs_sparse, 4 * q_bytes + 2 * kv_bytes + index_bytes + lse_bytes, gathered + gathered_again, 2 * pairs_sparse),
        ("gate fwd", lambda: gate_and_align(*streams, main="full"), 8 * tokens * heads * head_dim, 3 * q_bytes + lse_bytes / 2, 0.0, tokens * heads),
        ("gate bwd", lambda: torch.autograd.grad(aligned, streams, grads, retain_graph=True), 12 * tokens * heads * head_dim, 5 * q_bytes + 3 * lse_bytes, 0.0, tokens * heads),
        ("full fwd", lambda: problem.sdpa(SDPBackend.CUDNN_ATTENTION), 4 * head_dim * pairs_full, 2 * q_bytes + kv_bytes + lse_bytes, 0.0, pairs_full),
        ("full bwd", back(full), 10 * head_dim * pairs_full, 4 * q_bytes + 2 * kv_bytes + lse_bytes, 0.0, pairs_full),
    ]  # fmt: skip
    rates = {"tensor": matmul, "memory": copy, "L2": L2_BYTES_PER_SECOND, "exponentials": EXPONENTIALS_PER_SECOND}
    stages = []
    for name, call, *work in rows:
        ms = median_ms(call, repetitions_for(5.0))
        floors = {unit: 1e3 * amount / rate for (unit, rate), amount in zip(rates.items(), work, strict=True)}
        stages.append(Stage(f"{name}, {shape.name}", ms, *work, floors))
    return stages


def table(stages: list[Stage]) -> str:
    """Returns the stages as a table of text."""
    lines = [f"{'operator':<18} {'ms':>8} {'TFLOP/s':>8} {'TB/s':>6} {'L2 TB/s':>8}   floor"]
    for stage in stages:
        rates = (stage.flops / 1e9, stage.memory_bytes / 1e9, stage.l2_bytes / 1e9)
        tflops, memory, l2 = (amount / stage.ms for amount in rates)
        floor = stage.floors[stage.binds]
        lines.append(
            f"{stage.name:<18} {stage.ms:8.3f} {tflops:8.1f} {memory:6.2f} {l2:8.2f}   "
            f"{floor:.3f} ms by {stage.binds}: {floor / stage.ms:.0%}"
        )
    return "\n".join(lines)
