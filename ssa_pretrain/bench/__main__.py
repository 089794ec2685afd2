"""Entry point: `python -m ssa_pretrain.bench cases=8k,32k`, or under torchrun with two processes `cases=dp2,tp2`.

Times forward and backward of our methods and of plain megatron-core in turns, in one process on one device, and prints the ratios that the project
answers for. Rows are written as soon as they are measured. Settings, as key=value:

    cases      any of 8k, 32k, optimizer, fp8, recompute; dp2, tp2, tp2_overlap (user buffers) under two processes, which
               measure one GPU first
    model      a file of conf/model, default llama_1b
    length     tokens of a row, default 8192; the case 32k takes four times as many
    rows       rows of a microbatch, default 2
    rounds     turns of each variant, default 4
    runs       runs in a turn, default 3
    precision  bf16 or fp32
    out        folder, default outputs/bench

Without a GPU only small cases run: model=tiny length=256 rows=1 precision=fp32. Exit codes: 0 done, 3 wrong arguments.
"""

import gc
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ssa_pretrain.config import Config, ModelConfig, ParallelConfig, PrecisionName
from ssa_pretrain.config.machine import has_gpu
from ssa_pretrain.monitor.environment import versions
from ssa_pretrain.planning.flops import peak_flops
from ssa_pretrain.planning.memory import count_parameters
from ssa_pretrain.process import quieten_libraries
from ssa_pretrain.settings.output import pipe_may_close
from ssa_pretrain.signals import leaves_on_ctrl_c

CONF = Path(__file__).resolve().parents[2] / "conf" / "model"
PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine")
ONE_PROCESS = ("8k", "32k", "optimizer", "fp8", "recompute")
CPU_PARAMETERS = 50_000_000
CPU_TOKENS = 4096  # of a microbatch
TWO_PROCESSES = ("dp2", "tp2", "tp2_overlap")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command line."""

    cases: tuple[str, ...]
    model: str = "llama_1b"
    length: int = 8192
    rows: int = 2
    rounds: int = 4
    runs: int = 3
    precision: str = "bf16"
    out: str = "outputs/bench"


def read_options(arguments: Sequence[str], world_size: int) -> Options:
    """Return the options of a command line; exits with 3 after one sentence about what is wrong with it."""
    given: dict[str, Any] = {}
    for argument in arguments:
        key, sign, value = argument.partition("=")
        if not sign or key not in Options.__slots__:
            refuse(f"{argument!r} is none of {', '.join(f'{name}=' for name in Options.__slots__)}")
        given[key] = value
    known = TWO_PROCESSES if world_size == 2 else ONE_PROCESS
    cases = tuple(given.pop("cases", ",".join(known)).split(","))
    if wrong := [case for case in cases if case not in known]:
        hint = f"{', '.join(TWO_PROCESSES)} need torchrun --nproc-per-node 2, the others one process"
        refuse(f"cases={','.join(wrong)} must be of {', '.join(known)} with {world_size} process(es); {hint}")
    numbers: dict[str, int] = {}
    for name in ("length", "rows", "rounds", "runs"):
        text = given.pop(name, str(Options.__dataclass_fields__[name].default))
        if not text.isdigit() or int(text) < 1:
            refuse(f"{name}={text} must be a positive whole number")
        numbers[name] = int(text)
    options = Options(cases=cases, **numbers, **given)
    if not (CONF / f"{options.model}.yaml").is_file():
        names = sorted(path.stem for path in CONF.glob("*.yaml"))
        refuse(f"model={options.model} is no file of conf/model; try {', '.join(names)}")
    if options.precision not in ("bf16", "fp32"):
        refuse(f"precision={options.precision} must be bf16 or fp32; FP8 is the case fp8")
    return options


def require_small(options: Options) -> None:
    """Leaves with 3 where a case is too large for a CPU."""
    config = run_config(options)
    count, _ = count_parameters(config, config.model.padded_vocab_size(config.model.vocab_size or 4096))
    tokens = options.rows * options.length * (4 if "32k" in options.cases else 1)
    if count > CPU_PARAMETERS or tokens > CPU_TOKENS:
        refuse(
            f"model={options.model} ({count / 1e6:,.0f} million parameters) with {tokens:,} tokens needs a GPU, and torch sees none; "
            "for a small case on the CPU try cases=8k model=tiny length=256 rows=1 precision=fp32"
        )


def refuse(sentence: str) -> NoReturn:
    """Say what is wrong and leave."""
    print(f"ssa_pretrain.bench: {sentence}", file=sys.stderr)
    raise SystemExit(3)


def main() -> None:
    """Measure the cases and write the tables."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    options = read_options(sys.argv[1:], world_size)
    if not has_gpu():
        require_small(options)
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    if world_size > 1 and os.environ.get("RANK") == "0":
        measure_one_gpu(options)
    quieten_libraries()
    from ssa_pretrain.bench.cases import CASES, LAYOUTS
    from ssa_pretrain.bench.tables import append, read, write_ratios
    from ssa_pretrain.parallel.state import leave_layout, start, stop

    for case in options.cases:
        config = run_config(options, **LAYOUTS.get(case, {}))
        placement = start(config.parallel, seed=config.seed)
        measured = measure(CASES["optimizer" if case in LAYOUTS else case], case, config, placement, options)
        if placement.is_first:
            append(folder, measured)
            print(write_ratios(folder, read(folder)), flush=True)
        leave_layout()
    stop()


def run_config(
    options: Options, *, parallel: Mapping[str, Any] | None = None, engine: Mapping[str, Any] | None = None
) -> Config:
    """Return the configuration that engines are built from; `parallel` and `engine` are settings of those groups."""
    model = ModelConfig(**yaml.safe_load((CONF / f"{options.model}.yaml").read_text(encoding="utf-8")))
    config = Config(name="bench", model=model, parallel=ParallelConfig(**(parallel or {})))
    return replace(
        config,
        engine=replace(config.engine, **(engine or {})),
        data=replace(config.data, sequence_length=options.length),
        training=replace(config.training, micro_batch_size=options.rows),
        precision=replace(config.precision, name=PrecisionName(options.precision)),
    )


def measure(build, case: str, config: Config, placement, options: Options) -> list:
    """Return the rows of one case; its models are gone afterwards."""
    import torch

    from ssa_pretrain.bench.tables import Row
    from ssa_pretrain.bench.timing import in_turns

    vocab = config.model.vocab_size or 4096
    on_gpu = placement.device.type == "cuda"
    device = torch.cuda.get_device_name(placement.device) if on_gpu else "CPU"
    variants = build(config, placement, vocab)
    results = in_turns(
        [v.run for v in variants], rounds=options.rounds, runs_a_turn=options.runs, warmup=3 if on_gpu else 1
    )
    rows = []
    for variant, result in zip(variants, results, strict=True):
        seconds, world = result.ms / 1e3, placement.world_size
        precision = PrecisionName.fp8 if variant.name.endswith("fp8") else config.precision.name
        peak = peak_flops(device, precision)
        rate = variant.flops / seconds / world
        held = None if result.peak_bytes is None else (result.peak_bytes - variant.foreign_bytes) / 2**30
        rows.append(
            Row(
                case=case,
                model=options.model,
                variant=variant.name,
                ms=result.ms,
                spread=result.spread,
                tokens_per_second_per_gpu=variant.tokens / seconds / world if variant.tokens else None,
                model_tflops_per_gpu=rate / 1e12 if variant.flops else None,
                mfu=rate / peak if peak and variant.flops else None,
                peak_gib=held,
                world_size=world,
                device=device,
                versions=installed(),
                command="python -m ssa_pretrain.bench " + " ".join(sys.argv[1:]),
            )
        )
    del variants
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    return rows


def measure_one_gpu(options: Options) -> None:
    """Measure the whole step on one GPU of this machine by itself, before the processes join: what layouts are compared with."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
    environment = {k: v for k, v in os.environ.items() if k not in launcher and not k.startswith("TORCHELASTIC")}
    kept = [f"{name}={getattr(options, name)}" for name in Options.__slots__ if name != "cases"]
    subprocess.run([sys.executable, "-m", "ssa_pretrain.bench", "cases=optimizer", *kept], env=environment, check=True)


def installed() -> str:
    """Return the libraries' versions in one line."""
    found = versions()
    return ", ".join(f"{name} {found.get(name, '–')}" for name in PACKAGES)


if __name__ == "__main__":
    with leaves_on_ctrl_c("ssa_pretrain.bench"), pipe_may_close():
        main()
