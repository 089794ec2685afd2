"""Measures one case: builds its variants, times them in turns and returns one result per variant."""

import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ssa_pretrain.bench.options import DEFAULT_VOCAB, Options
from ssa_pretrain.bench.parts import write_parts
from ssa_pretrain.bench.tables import Result
from ssa_pretrain.bench.timing import Timing, mean_timing, time_in_turns
from ssa_pretrain.bench.variants import Variant
from ssa_pretrain.config import Config, PrecisionName
from ssa_pretrain.monitor.environment import versions
from ssa_pretrain.parallel.state import Placement
from ssa_pretrain.planning.flops import peak_flops

PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine")


def measure(
    build: Callable[[Config, Placement, int], list[Variant]],
    case: str,
    config: Config,
    placement: Placement,
    options: Options,
) -> list[Result]:
    """Returns the results of a case and frees its models.

    Args:
        build: builds the variants of the case.
        case: its name in the table.
        config: the configuration of its engines.
        placement: this process.
        options: rounds and runs, and the model's name.
    """
    on_gpu = placement.device.type == "cuda"
    variants = build(config, placement, config.model.vocab_size or DEFAULT_VOCAB)
    timings = _timings(variants, options, warmup=3 if on_gpu else 1)
    results = [_result(variant, timings[variant.name], case, config, placement, options) for variant in variants]
    if options.parts and placement.is_rank_0:
        write_parts(Path(options.out), variants)
    del variants  # with it the models, which the next case would otherwise have in its peaks
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    return results


def _result(
    variant: Variant, timing: Timing, case: str, config: Config, placement: Placement, options: Options
) -> Result:
    """Returns the line of a variant."""
    device = torch.cuda.get_device_name(placement.device) if placement.device.type == "cuda" else "CPU"
    seconds, world = timing.ms / 1e3, placement.world_size
    precision = PrecisionName.fp8 if variant.name.endswith("fp8") else config.precision.name
    peak = peak_flops(device, precision)
    rate = variant.flops / seconds / world
    own_bytes = None if timing.peak_bytes is None else timing.peak_bytes - variant.foreign_bytes
    return Result(
        case=case,
        model=f"{options.model}, {variant.model}" if variant.model else options.model,
        variant=variant.name,
        ms=timing.ms,
        spread=timing.spread,
        tokens_per_second_per_gpu=variant.tokens / seconds / world if variant.tokens else None,
        model_tflops_per_gpu=rate / 1e12 if variant.flops else None,
        mfu=rate / peak if peak and variant.flops else None,
        peak_gib=None if own_bytes is None else own_bytes / 2**30,
        world_size=world,
        device=device,
        versions=_versions(),
        command="python -m ssa_pretrain.bench " + " ".join(sys.argv[1:]),
    )


def _timings(variants: Sequence[Variant], options: Options, warmup: int) -> dict[str, Timing]:
    """Returns the timing of each variant by name: those with a run in turns, then the means."""
    runs = {variant.name: variant.run for variant in variants if variant.run is not None}
    measured = time_in_turns(list(runs.values()), rounds=options.rounds, runs_per_turn=options.runs, warmup=warmup)
    timings = dict(zip(runs, measured, strict=True))
    for variant in variants:
        if variant.run is None:
            timings[variant.name] = mean_timing([(weight, timings[name]) for name, weight in variant.mean_of.items()])
    return timings


def _versions() -> str:
    """Returns the versions of the libraries in one line."""
    installed = versions()
    return ", ".join(f"{name} {installed.get(name, '–')}" for name in PACKAGES)
