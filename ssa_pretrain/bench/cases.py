"""The cases: which variants are compared. The ratios between them are in goals.py.

A case builds its models and returns its variants, which take turns. Dropping the variants frees the models.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from ssa_pretrain.bench.plain_megatron import PlainModel
from ssa_pretrain.bench.variants import (
    LEARNING_RATE,
    Variant,
    batches,
    memory_in_use,
    pass_over,
    plain_pass,
    whole_step,
    with_method,
)
from ssa_pretrain.config import Config, Method, PrecisionName, Recompute
from ssa_pretrain.engine.megatron.engine import MegatronEngine
from ssa_pretrain.parallel.state import Placement
from ssa_pretrain.planning.flops import row_flops

Built = TypeVar("Built")
ACCUMULATED = 8  # microbatches in a whole step


def speed_8k(config: Config, placement: Placement, vocab: int) -> list[Variant]:
    """Returns forward and backward at 8k: core's own model and our three methods, with one document per row and with short ones."""
    plain, plain_bytes = _built(lambda: PlainModel(config, placement, vocab))
    engine, our_bytes = _built(lambda: MegatronEngine(config, placement, vocab))
    rows, short = (batches(config, placement, vocab, 1, short=s) for s in (False, True))
    counted = _counted(config, placement, 1)
    length = config.data.sequence_length
    found = [
        Variant(
            name="plain 8k", run=plain_pass(plain, rows[0], length), foreign_bytes=our_bytes, **counted[Method.full]
        )
    ]
    for method in Method:
        view = with_method(engine, method)
        common = {"foreign_bytes": plain_bytes, **counted[method]}
        found.append(Variant(name=f"{method} 8k", run=pass_over(view, rows), **common))
        if method is not Method.moba:  # operations of short documents are not counted: no MFU
            run = pass_over(view, short)
            found.append(Variant(name=f"{method} 8k short", run=run, **{**common, "flops": 0.0}))
    return found


def speed_32k(config: Config, placement: Placement, vocab: int) -> list[Variant]:
    """Returns forward and backward of our three methods on one row of four times the length, with RoPE scaling."""
    long = replace(
        config,
        data=replace(config.data, sequence_length=4 * config.data.sequence_length),
        training=replace(config.training, micro_batch_size=1),
        model=replace(config.model, rope_scaling=replace(config.model.rope_scaling, enabled=True)),
    )
    engine = MegatronEngine(long, placement, vocab)
    rows = batches(long, placement, vocab, 1, short=False)
    counted = _counted(long, placement, 1)
    return [Variant(name=f"{m} 32k", run=pass_over(with_method(engine, m), rows), **counted[m]) for m in Method]


def optimizer(config: Config, placement: Placement, vocab: int) -> list[Variant]:
    """Returns a whole step of ssa over 8 microbatches, and the optimizer by itself."""
    engine = MegatronEngine(config, placement, vocab)
    rows = batches(config, placement, vocab, ACCUMULATED, short=False)
    counted = _counted(config, placement, ACCUMULATED)[Method.ssa]
    tp, dp = config.parallel.tp, placement.dp
    layout = f" tp{tp}" if tp > 1 else f" dp{dp}" if dp > 1 else ""
    layout += " overlap" if config.engine.overlap_tp else ""
    return [
        Variant(name=f"ssa step{layout}", run=whole_step(with_method(engine, Method.ssa), rows), **counted),
        Variant(name=f"optimizer{layout}", run=lambda: engine.update(LEARNING_RATE)),
    ]


def fp8(config: Config, placement: Placement, vocab: int) -> list[Variant]:
    """Returns full and ssa, each in FP8 and in bf16."""
    low = replace(config, precision=replace(config.precision, name=PrecisionName.fp8))
    rows = batches(config, placement, vocab, 1, short=False)
    found = []
    engines = {
        name: _built(lambda c=c: MegatronEngine(c, placement, vocab)) for name, c in (("bf16", config), ("fp8", low))
    }
    total = sum(held for _, held in engines.values())
    for name, (engine, held) in engines.items():
        counted = _counted(engine.config, placement, 1)
        for method in (Method.full, Method.ssa):
            run = pass_over(with_method(engine, method), rows)
            found.append(Variant(name=f"{method} 8k {name}", run=run, foreign_bytes=total - held, **counted[method]))
    return found


def recompute(config: Config, placement: Placement, vocab: int) -> list[Variant]:
    """Returns ssa with no, selective and full recomputation."""
    rows = batches(config, placement, vocab, 1, short=False)
    names = {Recompute.none: "none", Recompute.selective: "selective", Recompute.full: "full recompute"}
    configs = {name: replace(config, engine=replace(config.engine, recompute=kind)) for kind, name in names.items()}
    engines = {name: _built(lambda c=c: MegatronEngine(c, placement, vocab)) for name, c in configs.items()}
    total = sum(held for _, held in engines.values())
    counted = _counted(config, placement, 1)[Method.ssa]
    return [
        Variant(
            name=f"ssa 8k {name}",
            run=pass_over(with_method(engine, Method.ssa), rows),
            foreign_bytes=total - held,
            **counted,
        )
        for name, (engine, held) in engines.items()
    ]


CASES = {
    "8k": speed_8k,
    "32k": speed_32k,
    "optimizer": optimizer,
    "fp8": fp8,
    "recompute": recompute,
}
TP2 = {"tp": 2, "sequence_parallel": True}
LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "dp2": {"engine": {"overlap_grad_reduce": True, "overlap_param_gather": True}},
    "tp2": {"parallel": TP2},
    "tp2_overlap": {"parallel": TP2, "engine": {"overlap_tp": True}},
}  # settings by group for two processes; each runs the case `optimizer`


def _built(build: Callable[[], Built]) -> tuple[Built, int]:
    """Returns the result of `build` and the bytes that it holds."""
    before = memory_in_use()
    return build(), memory_in_use() - before


def _counted(config: Config, placement: Placement, microbatches: int) -> dict[Method, dict[str, Any]]:
    """Returns tokens and model operations of one run over all ranks, by method, with one document per row."""
    rows = microbatches * config.training.micro_batch_size * placement.dp
    length = config.data.sequence_length
    found = {}
    for method in Method:
        flops = row_flops(config.model, replace(config.attention, method=method), [length]).model
        found[method] = {"tokens": rows * length, "flops": rows * flops}
    return found
