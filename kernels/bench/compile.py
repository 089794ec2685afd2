"""`PYTHONPATH=kernels python -m bench.compile`: compiles every kernel for GPUs that need not be present, and reads what they need.

Method. The operators' own launchers run on small CPU tensors, with `launch` replaced by a recorder and `gpu_of` by the GPU at hand: so the
tiles, warps, stages and compile-time sizes are those that this GPU gets. Then Triton's JIT compiles each recorded launch with a stand-in for
the driver, which knows only the target. The assembled code states registers, spills and shared memory; an AMD kernel's are in its assembly.
Each launch is compiled once, and Triton's cache on disk keeps it.

Nothing is run, so this says nothing about speed or values. A kernel whose shared memory exceeds the GPU's would fail at its first launch;
one that spills is slower than it was planned to be.
"""

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.driver import driver

from ssa_kernels.devices import KIB, KNOWN_GPUS, Gpu
from ssa_kernels.launch import COMPILER_OPTIONS

from .compile_cases import CASES, OPERATORS, SAMPLE, SAMPLE_KERNELS, Case, run

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True, slots=True)
class Launch:
    """A recorded launch."""

    kernel: Any
    args: tuple
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.fn.__name__


@dataclass(frozen=True, slots=True)
class Usage:
    """What a compiled kernel needs."""

    gpu: str
    case: str
    operator: str
    kernel: str
    warps: int
    registers: int  # per thread
    spilled: int  # bytes per thread
    shared: int  # bytes per program

    @property
    def problem(self) -> str:
        """What is wrong, in words; empty if nothing is."""
        if self.shared > KNOWN_GPUS[self.gpu].shared_bytes:
            return f"{self.shared:,} bytes of shared memory"
        return f"spills {self.spilled} bytes" if self.spilled else ""


def recorded(case: Case, operator: str, gpu: Gpu) -> list[Launch]:
    """Returns the launches of an operator, forward and backward, as they would be on a GPU."""
    found: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], *args: object, stream: object = None, **settings: object) -> None:
        found.append(Launch(kernel, args, settings))

    with _replaced("launch", record), _replaced("gpu_of", lambda device: gpu):
        run(case, operator)
    return found


def compiled(launch: Launch, gpu_name: str) -> Any:
    """Returns the compiled kernel of a launch."""
    with _target(gpu_name):
        return launch.kernel.run(*launch.args, grid=(1,), warmup=True, **launch.settings, **COMPILER_OPTIONS)


def usage(launch: Launch, gpu_name: str) -> dict[str, int]:
    """Returns a launch's warps, registers, spilled bytes and shared memory."""
    made = compiled(launch, gpu_name)
    numbers = _of_amd(made.asm["amdgcn"]) if "amdgcn" in made.asm else _of_nvidia(made, KNOWN_GPUS[gpu_name].capability)
    return {"warps": made.metadata.num_warps, **numbers, "shared": made.metadata.shared}


def table(wanted: Iterable[tuple[str, str, tuple[str, ...]]], kernels: tuple[str, ...] = ()) -> Iterator[Usage]:
    """Yields what each kernel needs, for (GPU, case, operators). A kernel is compiled once per operator, however often it is launched.

    Args:
        wanted: names of KNOWN_GPUS and CASES, and operators of the case.
        kernels: names of kernels, if only these are wanted.
    """
    for gpu_name, case_name, operators in wanted:
        for operator in operators:
            seen = set()
            for launch in recorded(CASES[case_name], operator, KNOWN_GPUS[gpu_name]):
                key = (launch.name, tuple(sorted((name, str(x)) for name, x in launch.settings.items())))
                if key not in seen and (not kernels or launch.name in kernels):
                    seen.add(key)
                    yield Usage(gpu_name, case_name, operator, launch.name, **usage(launch, gpu_name))


def main() -> int:
    """Compiles what was asked for, prints and writes the table, and returns 1 if a kernel spills or does not fit."""
    parser = argparse.ArgumentParser(
        prog="PYTHONPATH=kernels python -m bench.compile", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--gpus", nargs="+", default=list(KNOWN_GPUS), choices=list(KNOWN_GPUS), help="by Triton's names"
    )
    parser.add_argument(
        "--cases", nargs="+", default=list(CASES), choices=list(CASES), help="shapes of compile_cases.py"
    )
    parser.add_argument("--operators", nargs="+", default=list(OPERATORS), choices=list(OPERATORS), help="of each case")
    parser.add_argument("--sample", action="store_true", help="only the sample that the tests compile")
    parser.add_argument("--out", type=Path, help="folder for compiled.csv and compiled.md")
    parser.add_argument("--quiet", action="store_true", help="print only what is wrong")
    arguments = parser.parse_args()
    every = ((gpu, case) for gpu in arguments.gpus for case in arguments.cases)
    chosen = [(gpu, case, tuple(o for o in CASES[case].operators if o in arguments.operators)) for gpu, case in every]
    found = []
    for row in table(SAMPLE, SAMPLE_KERNELS) if arguments.sample else table(chosen):
        found.append(row)
        if row.problem or not arguments.quiet:
            print(
                f"{row.gpu:7} {row.case:26} {row.kernel:30} {row.registers:4} registers {row.shared:8,} B  {row.problem}",
                flush=True,
            )
    print(f"{len(found)} kernels, {sum(bool(row.problem) for row in found)} that spill or do not fit")
    if arguments.out is not None:
        write(found, arguments.out)
    return int(any(row.problem for row in found))


def write(found: list[Usage], folder: Path) -> None:
    """Writes every row to compiled.csv, and to compiled.md a table of the largest need of each operator, case and GPU."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "compiled.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(found[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in found)
    (folder / "compiled.md").write_text("\n".join(summary(found)) + "\n")


def summary(found: list[Usage]) -> Iterator[str]:
    """Yields a Markdown table: each cell has the most registers per thread and the most shared memory (KB) of an operator's kernels."""
    gpus = list(dict.fromkeys(row.gpu for row in found))
    yield f"| shape | operator | {' | '.join(gpus)} |"
    yield "|---" * (len(gpus) + 2) + "|"
    for case, operator in dict.fromkeys((row.case, row.operator) for row in found):
        rows = [row for row in found if (row.case, row.operator) == (case, operator)]
        cells = [_cell([row for row in rows if row.gpu == gpu]) for gpu in gpus]
        yield f"| {case} | {operator} | {' | '.join(cells)} |"


def _cell(rows: list[Usage]) -> str:
    """Returns the needs of an operator's kernels, and what is wrong with any of them; empty if none was compiled."""
    if not rows:
        return ""
    wrong = dict.fromkeys(f"{row.kernel} {row.problem}" for row in rows if row.problem)
    most = f"{max(row.registers for row in rows)}, {max(row.shared for row in rows) / KIB:.0f}"
    return f"{most} ({'; '.join(wrong)})" if wrong else most


def _of_nvidia(made: Any, capability: int) -> dict[str, int]:
    """Returns registers and spilled bytes of assembled code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin, tempfile.NamedTemporaryFile(suffix=".ptx") as ptx:
        cubin.write(made.asm["cubin"])
        cubin.flush()
        shown = _output(CUOBJDUMP, "--dump-resource-usage", cubin.name)
        numbers = {name: int(found) for name, found in re.findall(r"(REG|STACK):(\d+)", shown)}
        if not numbers["STACK"]:
            return {"registers": numbers["REG"], "spilled": 0}
        # A stack holds spilled registers or arrays (sine's reduction of large angles has one). The assembler tells them apart.
        ptx.write(made.asm["ptx"].encode())
        ptx.flush()
        target = re.search(r"\.target (\w+)", made.asm["ptx"])[1]
        shown = _output(get_ptxas(capability).path, "-v", f"--gpu-name={target}", ptx.name, "-o", os.devnull)
        return {"registers": numbers["REG"], "spilled": int(re.search(r"(\d+) bytes spill stores", shown)[1])}


def _output(*command: object) -> str:
    """Returns what a program prints."""
    return subprocess.run(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
    ).stdout


def _of_amd(text: str) -> dict[str, int]:
    """Returns vector registers and the bytes of scratch memory of an AMD kernel's assembly."""
    numbers = {
        name: int(found) for name, found in re.findall(r"\.(vgpr_count|private_segment_fixed_size): +(\d+)", text)
    }
    return {"registers": numbers["vgpr_count"], "spilled": numbers["private_segment_fixed_size"]}


@contextmanager
def _replaced(name: str, function: Any) -> Iterator[None]:
    """Replaces a function in every module of ssa_kernels that has it."""
    modules = [m for key, m in list(sys.modules.items()) if key.startswith("ssa_kernels") and hasattr(m, name)]
    modules = [m for m in modules if callable(getattr(m, name))]
    patches = [patch.object(module, name, function) for module in modules]
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()


@contextmanager
def _target(gpu_name: str) -> Iterator[None]:
    """Makes Triton compile for a GPU. The number of the stand-in's device keeps the JIT's caches of several GPUs apart."""
    gpu = KNOWN_GPUS[gpu_name]
    target = GPUTarget("cuda", gpu.capability, 32) if gpu.backend == "cuda" else GPUTarget("hip", gpu_name, 64)
    stand_in = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: list(KNOWN_GPUS).index(gpu_name),
        get_current_stream=lambda device: 0,
    )
    before = driver._active
    driver.set_active(stand_in)
    try:
        yield
    finally:
        driver._active = before


if __name__ == "__main__":
    sys.exit(main())
