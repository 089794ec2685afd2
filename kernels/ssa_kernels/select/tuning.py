"""Warps, stages and register limits of the selection's product kernels, by GPU.

Hopper's were chosen by measurement at group size 16, D 64 (kernels/LOG.md): four warps, and limits that let one program more fit a
multiprocessor. There the queries stay in shared memory for wgmma. Where products take their left operand from registers (mma.sync), and on
Blackwell, whose sums come back from tensor memory all at once, four warps spill; eight do not (kernels/bench/compile.py). Those were
compiled, not measured.
"""

from dataclasses import dataclass

from ..devices import Gpu

TILE_ROWS = 128  # (tokens x heads) of one tile
TILE_BLOCKS = 64  # block rows of one tile


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a kernel is compiled."""

    stages: int  # tiles of block means in flight
    warps: int
    max_registers: int | None  # per thread; None for no limit

    def options(self) -> dict[str, int]:
        """Returns the compiler's options."""
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.warps, **limit}


def tune_sums(gpu: Gpu, dim: int, element_bytes: int) -> Tuning:
    """Returns how the softmax sums are compiled, for `dim` padded features."""
    stages = _stages(gpu, 2, dim, element_bytes)
    if not _like_hopper(gpu):
        return Tuning(stages, 8, None)
    return Tuning(stages, 4, 96 if dim <= 64 else 168)


def tune_importance(
    gpu: Gpu, dim: int, element_bytes: int, *, padded_group: int, per_head: bool, with_bins: bool
) -> Tuning:
    """Returns how the importance is compiled. Four programs per multiprocessor fit up to D 64, except for `per_head`, which would spill."""
    narrow = dim <= 64
    stages = _stages(gpu, 3 if narrow else 2, dim, element_bytes)
    if not _like_hopper(gpu):
        return Tuning(stages, 8, None)
    if not narrow or per_head:
        return Tuning(stages, 4, None)
    return Tuning(stages, 4, 128 if with_bins or padded_group > 16 else 112)


def long_tiles_warps(gpu: Gpu, dim: int) -> int:
    """Returns the warps of the kernel for long documents, which has importance and top-k in one, for `dim` padded features."""
    return 4 if dim <= 64 and _like_hopper(gpu) else 8


def _like_hopper(gpu: Gpu) -> bool:
    return gpu.backend == "interpreter" or gpu.capability == 90


def _stages(gpu: Gpu, most: int, dim: int, element_bytes: int) -> int:
    """Returns the number of stages, at most `most`, that fit into shared memory beside a tile of queries."""
    row = dim * element_bytes
    return max(1, min(most, (gpu.shared_bytes - TILE_ROWS * row) // (TILE_BLOCKS * row)))
