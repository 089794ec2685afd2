"""The cases: which variants are compared. The ratios between them are in goals.py.

A case builds its models and returns its variants, which take turns. Dropping the variants frees the models.
"""

from dataclasses import replace
from typing import Any

from ssa_pretrain.bench.documents import Documents
from ssa_pretrain.bench.methods import methods
from ssa_pretrain.bench.nsa import nsa_8k, nsa_32k
from ssa_pretrain.bench.plain_megatron import PlainModel
from ssa_pretrain.bench.share import share_8k, share_32k, share_128k
from ssa_pretrain.bench.variants import (
    LEARNING_RATE,
    ONE_MODEL,
    Variant,
    batches,
    built,
    counted,
    long_rows,
    pass_over,
    plain_pass,
    whole_step,
    with_attention,
    work_of,
)
from ssa_pretrain.config import Config, Method, PrecisionName, Recompute, Score
from ssa_pretrain.engine.megatron.engine import MegatronEngine
from ssa_pretrain.parallel.state import Placement

ACCUMULATED = 8  # microbatches in a whole step


def speed_8k(config: Config, placement: Placement, vocab: int) -> list[Variant]:
    """Returns forward and backward at 8k: core's own model and our three methods, with one document per row and with short ones."""
    separate = replace(config, engine=replace(config.engine, fuse_gradient_accumulation=False))
    plain, plain_bytes = built(lambda: PlainModel(config, placement, vocab))
    engine, our_bytes = built(lambda: MegatronEngine(config, placement, vocab))
    unfused, unfused_bytes = built(lambda: MegatronEngine(separate, placement, vocab))
    rows, short = (batches(config, placement, vocab, 1, kind) for kind in (Documents.whole, Documents.short))
    work = counted(config, placement, 1)
    full = work[Method.full]
    plain_run = plain_pass(plain, rows[0], config.data.sequence_length)
    unfused_run = pass_over(with_attention(unfused, method=Method.full), rows)
    found = [
        Variant(name="plain 8k", run=plain_run, foreign_bytes=our_bytes + unfused_bytes, **full),
        Variant(name="full 8k unfused", run=unfused_run, foreign_bytes=plain_bytes + our_bytes, **full),
    ]
    for method in ONE_MODEL:
        view = with_attention(engine, method=method)
        common = {"foreign_bytes": plain_bytes + unfused_bytes, **work[method]}
        found.append(Variant(name=f"{method} 8k", run=pass_over(view, rows), **common))
        if method is not Method.moba:  # operations of short documents are not counted: no MFU
            run = pass_over(view, short)
            found.append(Variant(name=f"{method} 8k short", run=run, **{**common, "flops": 0.0}))
    return found


def speed_32k(config: Config, placement: Placement, vocab: int) -> list[Variant]:
    """Returns forward and backward of our three methods on one row of four times the length, with RoPE scaling."""
    long = long_rows(config, 4)
    engine = MegatronEngine(long, placement, vocab)
    rows = batches(long, placement, vocab, 1)
    work = counted(long, placement, 1)
    return [
        Variant(name=f"{m} 32k", run=pass_over(with_attention(engine, method=m), rows), **work[m]) for m in ONE_MODEL
    ]


def optimizer(config: Config, placement: Placement, vocab: int) -> list[Variant]:
    """Returns a whole step of ssa over 8 microbatches, and the optimizer by itself."""
    engine = MegatronEngine(config, placement, vocab)
    rows = batches(config, placement, vocab, ACCUMULATED)
    work = counted(config, placement, ACCUMULATED)[Method.ssa]
    tp, dp = config.parallel.tp, placement.dp
    layout = f" tp{tp}" if tp > 1 else f" dp{dp}" if dp > 1 else ""
    layout += " overlap" if config.engine.overlap_tp else ""
    return [
        Variant(name=f"ssa step{layout}", run=whole_step(with_attention(engine, method=Method.ssa), rows), **work),
        Variant(name=f"optimizer{layout}", run=lambda: engine.update(LEARNING_RATE)),
    ]


def fp8(config: Config, placement: Placement, vocab: int) -> list[Variant]:
    """Returns full and ssa, each in FP8 and in bf16."""
    low = replace(config, precision=replace(config.precision, name=PrecisionName.fp8))
    rows = batches(config, placement, vocab, 1)
    found = []
    engines = {
        name: built(lambda c=c: MegatronEngine(c, placement, vocab)) for name, c in (("bf16", config), ("fp8", low))
    }
    total = sum(held for _, held in engines.values())
    for name, (engine, held) in engines.items():
        work = counted(engine.config, placement, 1)
        for method in (Method.full, Method.ssa):
            run = pass_over(with_attention(engine, method=method), rows)
            found.append(Variant(name=f"{method} 8k {name}", run=run, foreign_bytes=total - held, **work[method]))
    return found


def _ssa_engines(configs: dict[str, Config], config: Config, placement: Placement, vocab: int) -> list[Variant]:
    """Returns forward and backward of ssa at 8k by an engine of each configuration, by name; counted as `config`'s."""
    rows = batches(config, placement, vocab, 1)
    engines = {name: built(lambda c=c: MegatronEngine(c, placement, vocab)) for name, c in configs.items()}
    total = sum(held for _, held in engines.values())
    work = counted(config, placement, 1)[Method.ssa]
    return [
        Variant(
            name=f"ssa 8k {name}",
            run=pass_over(with_attention(engine, method=Method.ssa), rows),
            foreign_bytes=total - held,
            **work,
        )
        for name, (engine, held) in engines.items()
    ]


def recompute(config: Config, placement: Placement, vocab: int) -> list[Variant]:
    """Returns ssa with no, selective and full recomputation."""
    names = {Recompute.none: "none", Recompute.selective: "selective", Recompute.full: "full recompute"}
    configs = {name: replace(config, engine=replace(config.engine, recompute=kind)) for kind, name in names.items()}
    return _ssa_engines(configs, config, placement, vocab)


def indexer(config: Config, placement: Placement, vocab: int) -> list[Variant]:
    """Returns forward and backward at 8k with a trained scorer: its method in the warm-up and after it, and inside ssa."""
    alone = {"method": Method.indexer, "block_size": 128, "full_ratio": 0.0, "counterpart_share": 0.125}
    views = {
        "warm-up": {"indexer": replace(config.attention.indexer, warmup_steps=1 << 30)},
        "sparse": {"indexer": replace(config.attention.indexer, warmup_steps=0)},
    }
    rows, engines = batches(config, placement, vocab, 1), {}
    for name, settings in (("indexer", alone), ("ssa", {"method": Method.ssa})):
        trained = replace(config, attention=replace(config.attention, score=Score.indexer, **settings))
        engines[name] = built(lambda c=trained: MegatronEngine(c, placement, vocab))
    (engine, held), (inside, inside_held) = engines.values()
    common = work_of(engine.config, placement, 1) | {"foreign_bytes": inside_held}
    found = []
    for name, settings in views.items():
        work: dict[str, Any] = {**common, "flops": 0.0 if name == "warm-up" else common["flops"]}  # counted as after it
        found.append(
            Variant(name=f"indexer 8k {name}", run=pass_over(with_attention(engine, **settings), rows), **work)
        )
    common = work_of(inside.config, placement, 1) | {"foreign_bytes": held}
    return [*found, Variant(name="ssa with indexer 8k", run=pass_over(inside, rows), **common)]


def keys(config: Config, placement: Placement, vocab: int) -> list[Variant]:
    """Returns ssa as it is, with QK-norm, and with a convolution of keys of width 3."""
    configs = {
        "plain keys": config,
        "QK-norm": replace(config, model=replace(config.model, qk_norm=True)),
        "key convolution": replace(config, attention=replace(config.attention, key_convolution=3)),
    }
    return _ssa_engines(configs, config, placement, vocab)


CASES = {
    "8k": speed_8k,
    "32k": speed_32k,
    "nsa_8k": nsa_8k,
    "nsa_32k": nsa_32k,
    "share_8k": share_8k,
    "share_32k": share_32k,
    "share_128k": share_128k,
    "methods": methods,
    "optimizer": optimizer,
    "fp8": fp8,
    "recompute": recompute,
    "indexer": indexer,
    "keys": keys,
}
TP2 = {"tp": 2, "sequence_parallel": True}
LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "dp2": {"engine": {"overlap_grad_reduce": True, "overlap_param_gather": True}},
    "tp2": {"parallel": TP2},
    "tp2_overlap": {"parallel": TP2, "engine": {"overlap_tp": True}},
}  # settings by group for two processes; each runs the case `optimizer`
