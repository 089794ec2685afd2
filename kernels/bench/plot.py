"""The roofline: each operator's operations per second over its operations per byte, below the ceilings measured in the same run."""

import sys
from pathlib import Path

import numpy as np

from .bounds import L2_BYTES_PER_SECOND, Stage


def roofline(stages: list[Stage], copy: float, matmul: float, path: Path) -> None:
    """Writes the plot to `path`: filled marks against device memory, hollow ones against the L2's gathers. Prints a hint instead if matplotlib is missing."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print(f"{path.name} is left out: install matplotlib (extra bench) for the plot", file=sys.stderr)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6))
    intensity = np.logspace(-1, 4.5, 200)
    axes.loglog(
        intensity, np.minimum(matmul, intensity * copy) / 1e12, "k-", label=f"device memory {copy / 1e12:.2f} TB/s"
    )
    axes.loglog(
        intensity,
        np.minimum(matmul, intensity * L2_BYTES_PER_SECOND) / 1e12,
        "k--",
        label=f"L2 {L2_BYTES_PER_SECOND / 1e12:.1f} TB/s",
    )
    operators = list(dict.fromkeys(stage.name.split(",")[0] for stage in stages))
    lengths = list(dict.fromkeys(stage.name.split(", ")[-1] for stage in stages))
    for stage in stages:
        rate = stage.flops / stage.ms / 1e9
        color = f"C{operators.index(stage.name.split(',')[0]) % 10}"
        mark = "osD^"[lengths.index(stage.name.split(", ")[-1]) % 4]
        label = f"{stage.name}: {stage.floors[stage.binds] / stage.ms:.0%} of {stage.binds}"
        axes.plot(stage.flops / stage.memory_bytes, rate, mark, color=color, label=label)
        if stage.l2_bytes:
            axes.plot(stage.flops / stage.l2_bytes, rate, mark, color=color, fillstyle="none")
    axes.set_xlabel("operations per byte (filled: device memory, hollow: L2)")
    axes.set_ylabel("TFLOP/s")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
