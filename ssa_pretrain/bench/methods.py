"""The case `methods`: forward and backward of every attention method, ssa also at lower counterpart shares.

Methods with the same layer (`ATTENTION` of model/spec.py) share the weights of one engine, as in share.py. A method with another layer gets its own engine,
with the settings of its file in conf/attention/. All take turns on the same random rows, one document each.
"""

from dataclasses import replace

import yaml

from ssa_pretrain.bench.share import EIGHTH, QUARTER, share_variants
from ssa_pretrain.bench.variants import Variant, batches, memory_in_use, pass_over
from ssa_pretrain.config import CONF, AttentionConfig, Config, Method
from ssa_pretrain.engine.megatron.engine import MegatronEngine
from ssa_pretrain.model.spec import ATTENTION
from ssa_pretrain.parallel.state import Placement
from ssa_pretrain.planning.flops import row_flops
from ssa_pretrain.settings.convert import config_from_dict
from ssa_pretrain.settings.problems import ConfigError


def methods(config: Config, placement: Placement, vocab: int) -> list[Variant]:
    """Returns the variants: full, moba and ssa at three shares, then every method with a layer of its own."""
    label, rows = str(config.data.sequence_length), batches(config, placement, vocab, 1)
    before = memory_in_use()
    engine = MegatronEngine(config, placement, vocab)
    shared = share_variants(engine, label, rows, (1, QUARTER, EIGHTH))
    held = {"shared": memory_in_use() - before}
    own = []
    for method in own_layers():
        attention = attention_of(method)
        changed, before = replace(config, attention=attention), memory_in_use()
        run = pass_over(MegatronEngine(changed, placement, vocab), rows)
        held[method] = memory_in_use() - before
        count = config.training.micro_batch_size * placement.dp
        length = config.data.sequence_length
        flops = count * row_flops(config.model, attention, [length]).model
        own.append(Variant(name=f"share {method} {label}", run=run, tokens=count * length, flops=flops))
    total = sum(held.values())
    found = [replace(variant, foreign_bytes=total - held["shared"]) for variant in shared]
    return found + [
        replace(variant, foreign_bytes=total - held[m]) for m, variant in zip(own_layers(), own, strict=True)
    ]


def own_layers() -> list[Method]:
    """Returns the methods whose layer is not the one of ssa, full and moba."""
    return [method for method in Method if ATTENTION[method] is not ATTENTION[Method.ssa]]


def attention_of(method: Method) -> AttentionConfig:
    """Returns the settings of a method's file in conf/attention/, without the indexer's warm-up, whose steps are those of full attention."""
    tree = yaml.safe_load((CONF / "attention" / f"{method}.yaml").read_text(encoding="utf-8"))
    attention, problems = config_from_dict(AttentionConfig, tree)
    if problems:
        raise ConfigError(problems)
    return replace(attention, indexer=replace(attention.indexer, warmup_steps=0))
