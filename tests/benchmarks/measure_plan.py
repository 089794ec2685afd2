"""Measures what the planner's cost model is fitted to, and appends it to a file in the form of ssa_pretrain/planning/measured_runs.csv.

    python tests/benchmarks/measure_plan.py --out outputs/measured_runs.csv                   # one GPU, about 100 s on an H200
    python tests/benchmarks/measure_plan.py --out outputs/measured_runs.csv --only 32k        # some cases
    torchrun --standalone --nproc-per-node 2 tests/benchmarks/measure_plan.py --out outputs/measured_runs.csv \
        --case "step 8 model=llama_1b data.sequence_length=8192 training.micro_batch_size=2 parallel.cp=2"

The cases are the 1B model in bf16 on one GPU: full, moba and ssa at 8k with one and two rows per microbatch and at 32k, ssa at a counterpart share of 1/4
with either main stream, selective and full recomputation, and a whole step of eight microbatches. --case adds one: "pass" (forward and backward) or "step"
(also the optimizer), the number of microbatches, and the settings in which it differs from the schema's defaults; model=NAME is a file of conf/model.

A time is the median over rounds after a warm-up. The peak is that of tensors, by part: weights, gradients and optimizer are added up from the tensors
themselves, and the rest of the peak is activations with their workspaces. Cases that differ in attention or rows share one model, since these change no
weight. Each case is written and printed, beside the planner's estimate, as soon as it is measured. Under torchrun, all ranks measure and rank 0 writes.

Tokens are random and rows are one document each. On a CPU only small models run (--model tiny), and no memory is measured.
"""

import argparse
import copy
import csv
import datetime
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)] * (str(ROOT) not in sys.path)

from ssa_pretrain.config import CONF, Config  # noqa: E402
from ssa_pretrain.libraries import hide_library_warnings  # noqa: E402
from ssa_pretrain.planning.calibration import calibration, peak_bytes, terms  # noqa: E402
from ssa_pretrain.planning.measured import COLUMNS, config_of, hardware_of, measured_runs  # noqa: E402

GIB = 2**30
SHORT, LONG = (
    "data.sequence_length=8192 training.micro_batch_size={rows}",
    "data.sequence_length=32768 training.micro_batch_size=1",
)
SHARES = {
    "full": 0.375,
    "sparse": 0.125,
}  # the shares that training draws at a counterpart share of 1/4, by main stream


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        name: for --only.
        work: "pass" or "step".
        microbatches: per data rank.
        settings: in which it differs from the schema's defaults.
    """

    name: str
    work: str
    microbatches: int
    settings: str


def default_cases(model: str, length: int = 8192) -> list[Case]:
    """Returns the cases of one GPU; those that share a model are neighbours."""
    found, methods = [], ("full", "moba", "ssa")
    head = f"model={model} "

    def add(name: str, settings: str, work: str = "pass", microbatches: int = 1) -> None:
        settings = settings.replace("8192", str(length)).replace("32768", str(4 * length))
        found.append(Case(name, work, microbatches, head + settings))

    for rows in (2, 1):
        for method in methods:
            add(f"8k {method} rows {rows}", f"{SHORT.format(rows=rows)} attention.method={method}")
    for main, share in SHARES.items():
        forced = f"attention.full_ratio={int(main == 'full')} attention.counterpart_share={share}"
        add(f"8k quarter {main}", f"{SHORT.format(rows=2)} {forced}")
    add("8k step", SHORT.format(rows=2), "step", 8)
    for recompute in ("selective", "full"):
        for method in ("full", "ssa"):
            words = f"attention.method={method} engine.recompute={recompute}"
            add(f"8k {recompute} recompute {method}", f"{SHORT.format(rows=2)} {words}")
    for method in methods:
        add(f"32k {method}", f"{LONG} attention.method={method}")
    return found


def parse_case(text: str) -> Case:
    """Returns the case of a --case option; SystemExit with one sentence if it is wrong."""
    work, _, rest = text.partition(" ")
    number, _, settings = rest.partition(" ")
    if work not in ("pass", "step") or not number.isdecimal() or "model=" not in settings:
        sys.exit(f'--case "{text}" must be pass or step, a number of microbatches, and settings with model=NAME')
    return Case(settings, work, int(number), settings)


def main() -> int:
    """Measures the cases and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/measured_runs.csv"))
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--case", action="append", default=[], help="another case instead of the default ones")
    parser.add_argument("--model", default="llama_1b")
    parser.add_argument("--length", type=int, default=8192, help="tokens per row of the 8k cases")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no case after this many")
    options = parser.parse_args()
    cases = [*map(parse_case, options.case)] or [
        case for case in default_cases(options.model, options.length) if options.only in case.name
    ]
    begin = time.monotonic()
    measurement = Measurement(options.out, options.rounds)
    for case in cases:
        if time.monotonic() - begin > options.seconds:
            print(f"not measured, out of time: {case.name}", flush=True)
            continue
        measurement.measure(case)
    measurement.close()
    print(f"{time.monotonic() - begin:.0f} s", flush=True)
    return 0


class Measurement:
    """Measures cases one after another and keeps the newest model.

    Args:
        out: the file that lines are appended to.
        rounds: timed runs per case.
    """

    def __init__(self, out: Path, rounds: int) -> None:
        hide_library_warnings()
        self._out, self._rounds = out, rounds
        self._key, self._engine, self._placement = None, None, None

    def measure(self, case: Case) -> None:
        """Measures a case, appends its line and prints it beside the planner's estimate."""
        import torch

        from ssa_pretrain.bench.variants import batches, pass_over, whole_step

        config = config_of(case.settings)
        engine = self._built(config, case)
        placement, on_gpu = engine.placement, engine.placement.device.type == "cuda"
        data = batches(config, placement, config.model.vocab_size or 4096, case.microbatches)
        run = (whole_step if case.work == "step" else pass_over)(engine, data)
        run()  # compiles; the first step also creates the optimizer's moments
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        seconds = statistics.median(_timed(run, on_gpu) for _ in range(self._rounds))
        parts = _parts(engine) if on_gpu else {}
        if placement.is_rank_0:
            self._write(case, seconds, parts, placement.world_size)

    def close(self) -> None:
        """Frees the model and leaves the process group."""
        from ssa_pretrain.parallel.state import stop

        self._free()
        stop()

    def _built(self, config: Config, case: Case):
        """Returns an engine with a configuration: a view of the newest model if only attention or rows differ."""
        from ssa_pretrain.engine.megatron.engine import MegatronEngine
        from ssa_pretrain.parallel.state import start

        neutral = replace(config, attention=Config().attention, training=Config().training)
        # A step leaves moments behind, which a pass does not have.
        key = (str(neutral), case.work)
        if key != self._key:
            self._free()
            self._placement = start(config.parallel, seed=config.seed)
            self._engine = MegatronEngine(config, self._placement, config.model.vocab_size or 4096)
            self._key = key
        view = copy.copy(self._engine)
        view.config = config
        view.microbatches = replace(view.microbatches, config=config)
        return view

    def _free(self) -> None:
        """Frees the newest model and its groups of ranks."""
        import torch

        from ssa_pretrain.parallel.state import reset_layout

        if self._engine is not None:
            self._engine = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            reset_layout()

    def _write(self, case: Case, seconds: float, parts: dict[str, float], world_size: int) -> None:
        """Appends a line and prints it beside the estimate."""
        name = _hardware_name()
        source = f"measure_plan.py, {_device_name()}, torch {_version('torch')}"
        values = [datetime.date.today().isoformat(), _commit(), name, world_size, case.work, case.microbatches]
        values += [case.settings, "whole", f"{seconds * 1e3:.1f}"]
        values += [f"{parts[part] / GIB:.3f}" if part in parts else "" for part in ("peak", "weights", "gradients")]
        values += [f"{parts[part] / GIB:.3f}" if part in parts else "" for part in ("optimizer", "activations")]
        self._out.parent.mkdir(parents=True, exist_ok=True)
        fresh = not self._out.exists()
        with self._out.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([COLUMNS] * fresh + [[*values, source]])
        run, factors = measured_runs(self._out)[-1], calibration().factors
        planned = sum(factors[term] * ideal for term, ideal in terms(run).items())
        line = f"{case.name}: {seconds * 1e3:.1f} ms, planned {planned * 1e3:.1f} ({planned / seconds - 1:+.1%})"
        if parts:
            share = peak_bytes(run) / parts["peak"] - 1
            line += f"; peak {parts['peak'] / GIB:.2f} GiB, planned {peak_bytes(run) / GIB:.2f} ({share:+.1%})"
            line += "".join(f"; {part} {size / GIB:.2f}" for part, size in parts.items() if part != "peak")
        print(line, flush=True)


def _timed(run: Callable[[], object], on_gpu: bool) -> float:
    """Returns the seconds of a run, launch gaps included."""
    import torch

    if on_gpu:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _parts(engine) -> dict[str, float]:
    """Returns the bytes of a rank's tensors by part, and the peak."""
    import torch

    from ssa_pretrain.engine.finite import optimizer_tensors
    from ssa_pretrain.engine.megatron.checkpoint import inner_optimizers

    def size(tensors) -> float:
        return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))

    weights = size(parameter for chunk in engine.chunks for parameter in chunk.parameters())
    gradients = size(buffer.grad_data for chunk in engine.chunks for buffer in chunk.buffers)
    optimizer = size(tensor for _, tensor in optimizer_tensors(inner_optimizers(engine.optimizer)))
    peak = float(torch.cuda.max_memory_allocated())
    return {
        "peak": peak,
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": peak - weights - gradients - optimizer,
    }


def _hardware_name() -> str:
    """Returns the file of conf/hardware whose GPU this machine has; h200 on a machine without one, only to try the program."""
    device = _device_name()
    for path in sorted((CONF / "hardware").glob("*.yaml")):
        if device == hardware_of(path.stem).gpu:
            return path.stem
    if device == "CPU":
        return "h200"
    sys.exit(f"{device} has no file in conf/hardware; add one whose `gpu` is this name")


def _device_name() -> str:
    """Returns the name of the device that the driver reports."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def _commit() -> str:
    """Returns the commit of this checkout, empty without git."""
    words: Sequence[str] = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ)
    return done.stdout.strip()


def _version(package: str) -> str:
    """Returns the version of a package."""
    from importlib.metadata import version

    return version(package)


if __name__ == "__main__":
    sys.exit(main())
