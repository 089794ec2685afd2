"""The cases of `attention=nsa`, whose weights differ from those of the other methods: one engine for nsa, and one for full and moba."""

from dataclasses import replace

from ssa_pretrain.bench.variants import Variant, batches, built, long_rows, pass_over, with_attention, work_of
from ssa_pretrain.config import Config, Method, Score
from ssa_pretrain.engine.megatron.engine import MegatronEngine
from ssa_pretrain.parallel.state import Placement


def nsa_8k(config: Config, placement: Placement, vocab: int) -> list[Variant]:
    """Returns full, moba and nsa at 8k, with one document per row."""
    return _methods(config, placement, vocab, "8k")


def nsa_32k(config: Config, placement: Placement, vocab: int) -> list[Variant]:
    """Returns full, moba and nsa on one row of four times the length, with RoPE scaling."""
    return _methods(long_rows(config, 4), placement, vocab, "32k")


def _methods(config: Config, placement: Placement, vocab: int, rows_name: str) -> list[Variant]:
    """Returns forward and backward of the methods, which take turns."""
    own = replace(config, attention=replace(config.attention, method=Method.nsa, score=Score.compressed))
    (engine, shared_bytes), (nsa, own_bytes) = (
        built(lambda c=c: MegatronEngine(c, placement, vocab)) for c in (config, own)
    )
    rows, found = batches(config, placement, vocab, 1), []
    for method in (Method.full, Method.moba, Method.nsa):
        is_own = method is Method.nsa
        run = pass_over(nsa if is_own else with_attention(engine, method=method), rows)
        foreign = shared_bytes if is_own else own_bytes
        work = work_of(replace(config, attention=replace(config.attention, method=method)), placement, 1)
        found.append(Variant(name=f"nsa case, {method} {rows_name}", run=run, foreign_bytes=foreign, **work))
    return found
