"""Measures one case on this rank: losses of the first steps, tokens/s of whole steps, peak memory, and communication that a step waits for.

All ranks call these functions together. Rows are random tokens, one document each, and depend on their place in the global batch only. So every
layout sees the same rows, and its losses can be compared with one GPU's. Times are the slowest rank's. Variants of a layout share one engine and
take turns (ssa_pretrain/bench/timing.py).
"""

import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from benchmarks.scaling import exchange
from benchmarks.scaling.cases import VARIANTS, Case, Size, case_config, with_equal_share
from ssa_pretrain.bench.timing import time_in_turns
from ssa_pretrain.bench.variants import memory_in_use, whole_step, with_attention
from ssa_pretrain.config import Config, EngineName, Method
from ssa_pretrain.data.batches import Batch, collate
from ssa_pretrain.data.rows import Row
from ssa_pretrain.engine import build_engine
from ssa_pretrain.monitor.profiling import breakdown, read_trace
from ssa_pretrain.parallel.state import Placement
from ssa_pretrain.planning.estimate import as_plan_config, estimate
from ssa_pretrain.planning.flops import peak_flops, row_flops
from ssa_pretrain.planning.measured import hardware_of
from ssa_pretrain.planning.plan import Plan, make_plan

LEARNING_RATE = 1e-4  # of the steps whose losses are compared
LOSS_STEPS = {"8k": 3, "32k": 2}
TRACES = 2  # traced steps; the one that waits least counts, since a busy host only ever adds waits


def measure(case: Case, size: Size, placement: Placement, host_gpus: int) -> list[dict[str, Any]]:
    """Returns a case's results, one per variant; the first has the losses and the time of the fixed global batch, unless the case has rows of its own.

    Args:
        case: layout, length and variants.
        size: the model and its batches.
        placement: this process.
        host_gpus: the largest number of GPUs that the fixed batch is for.
    """
    before = memory_in_use()
    fixed = case_config(case, size, host_gpus)
    weak = with_equal_share(fixed, case, size)
    engine = build_engine(fixed, placement, fixed.model.vocab_size)
    first = {} if case.rows else losses(engine, fixed, placement, steps=LOSS_STEPS[case.length])
    if weak.engine.name is EngineName.deepspeed:  # its number of microbatches is fixed
        del engine
        release()
        engine = build_engine(weak, placement, weak.model.vocab_size)
        views = {case.variants[0]: engine}
    else:
        views = {name: with_attention(engine, **variant_settings(name)) for name in case.variants}
    rows = global_batch(weak, placement, 0)
    runs = {name: whole_step(view, rows) for name, view in views.items()}
    for view in views.values():
        warm_up(view, weak, rows)
    timings = time_in_turns(list(runs.values()), rounds=case.rounds, runs_per_turn=1, warmup=0)
    results = []
    for (name, run), timing in zip(runs.items(), timings, strict=True):
        peak = None if timing.peak_bytes is None else timing.peak_bytes - before
        found = speed(case, weak, name, largest(timing.ms, placement), placement)
        found |= {"spread": timing.spread, "peak_gib": None if peak is None else largest(peak, placement) / 2**30}
        found |= waits(run, placement) if name in case.exposed else {}
        results.append(found | (first if name == case.variants[0] else {}))
    del engine, views, runs, view, run
    release()
    return results


def variant_settings(name: str) -> dict[str, Any]:
    """Returns the attention settings of a variant, as the schema has them."""
    return {key: Method(value) if key == "method" else value for key, value in VARIANTS[name].items()}


def train(engine: Any, config: Config, placement: Placement, steps: range) -> tuple[list[list[float]], list[float]]:
    """Trains on fixed global batches. Returns each step's loss and gradient norm, and its seconds."""
    found, seconds = [], []
    for step in steps:
        rows = global_batch(config, placement, step)
        begin = time.perf_counter()
        result = engine.train_step(rows, step=step, learning_rate=LEARNING_RATE).result()
        wait_for_device()
        seconds.append(time.perf_counter() - begin)
        found.append([result.cross_entropy, result.grad_norm])
    return found, seconds


def losses(engine: Any, config: Config, placement: Placement, *, steps: int) -> dict[str, Any]:
    """Trains on the fixed global batch. Returns each step's loss and gradient norm, and tokens/s per GPU of the steps after the first."""
    found, seconds = train(engine, config, placement, range(steps))
    tokens = config.training.global_batch_tokens / placement.world_size
    strong = tokens / largest(min(seconds[1:]), placement)
    return {"losses": found, "fixed_tokens": config.training.global_batch_tokens, "fixed_tokens_per_second": strong}


def global_batch(config: Config, placement: Placement, number: int) -> list[Batch]:
    """Returns this rank's microbatches of a global batch of random rows, the same rows for every layout."""
    size, length = config.training.micro_batch_size, config.data.sequence_length
    count = config.training.global_batch_tokens // (size * length)

    def row(place: int) -> Row:
        generator = np.random.default_rng([config.seed, number, place])
        tokens = generator.integers(0, config.model.vocab_size, length + 1)
        return Row(tokens, np.zeros(length + 1, dtype=bool))

    mine = range(placement.dp_rank, count, placement.dp)
    return [collate([row(size * index + i) for i in range(size)], index=index) for index in mine]


def warm_up(engine: Any, config: Config, rows: list[Batch]) -> None:
    """Runs what the first timed step would otherwise compile: a step with as many microbatches as the pipeline needs at least."""
    count = len(rows) if config.engine.name is EngineName.deepspeed else min(len(rows), 2 * config.parallel.pp)
    engine.train_step(rows[:count], step=0, learning_rate=LEARNING_RATE).result()


def speed(case: Case, config: Config, variant: str, ms: float, placement: Placement) -> dict[str, Any]:
    """Returns what follows from a step's time: tokens/s per GPU, MFU, and the plan's memory."""
    world, attention = placement.world_size, replace(config.attention, **variant_settings(variant))
    config = replace(config, attention=attention)
    plan = make_plan(config, world)
    per_second = plan.tokens_per_step / (ms / 1e3) / world
    flops = row_flops(config.model, attention, [config.data.sequence_length]).model / config.data.sequence_length
    on_gpu = placement.device.type == "cuda"
    device = torch.cuda.get_device_name(placement.device) if on_gpu else "CPU"
    peak = peak_flops(device, config.precision.name)
    return {
        "case": case.name,
        "layout": case.layout,
        "length": case.length,
        "gpus": world,
        "variant": variant,
        "microbatches": plan.num_microbatches,
        "ms": ms,
        "tokens_per_second": per_second,
        "mfu": per_second * flops / peak if peak else None,
        "device": device,
        **planned(config, plan, device),
    }


def planned(config: Config, plan: Plan, device: str) -> dict[str, float | None]:
    """Returns what the planner predicts: the peak memory of a rank, and the time of a step, None on a device that conf/hardware lacks."""
    name = next((known for known in ("h100", "h200", "b200") if known.upper() in device), None)
    if name is None:
        return {"planned_gib": plan.memory_bytes / 2**30, "planned_ms": None}
    costs = estimate(as_plan_config(config, hardware_of(name)), plan)
    return {"planned_gib": costs.peak_bytes / 2**30, "planned_ms": costs.step.total * 1e3}


def waits(run: Callable[[], object], placement: Placement) -> dict[str, Any]:
    """Returns the share of a step in which communication is exposed: the largest over the ranks, and its parts on rank 0. Of several steps, the one with the smallest share."""
    return min((_waits(run, placement) for _ in range(TRACES)), key=lambda found: found["exposed"])


def _waits(run: Callable[[], object], placement: Placement) -> dict[str, Any]:
    on_gpu = placement.device.type == "cuda"
    wait_for_device()
    dist.barrier()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        run()
        wait_for_device()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = read_trace(path)
    found = breakdown(events)
    total = found.total or 1.0
    return {
        "exposed": largest(found.exposed / total, placement),
        "hidden": found.hidden / total,
        "idle": found.idle / total,
        "traced_ms": found.total / 1e3,
        "parts": exchange.parts(events),
    }


def largest(value: float, placement: Placement) -> float:
    """Returns the largest value over all ranks."""
    tensor = torch.tensor(float(value), dtype=torch.float64, device=placement.device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)


def wait_for_device() -> None:
    """Waits until the device has done everything that is queued."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def release() -> None:
    """Frees the memory of engines that nobody uses."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
