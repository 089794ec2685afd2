"""The cases of `attention.counterpart_share`: ssa at several shares against full and moba.

Below a share of 1 the cost of a microbatch depends on its main stream: if that is full, some queries add the sparse
stream to full attention; if it is sparse, fewer queries add the full stream to sparse attention. A run over a few
microbatches that draw their streams would measure the luck of the draw. So each kind is forced (`full_ratio` 1 or 0, and
as `counterpart_share` the share that training draws for that kind) and timed as a variant of its own. The result of ssa
is their mean, weighted by `full_ratio`: the time of a microbatch in a long run. The sample of queries is drawn again in
each run. At these shares all samples of a kind have the same size.
"""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch

from ssa_pretrain.bench.documents import Documents
from ssa_pretrain.bench.variants import Variant, batches, long_rows, pass_over, with_attention, work_of
from ssa_pretrain.config import AttentionConfig, Config, Method
from ssa_pretrain.data.batches import Batch
from ssa_pretrain.engine.megatron.engine import MegatronEngine
from ssa_pretrain.parallel.state import Placement
from ssa_pretrain.planning.memory import activation_bytes, count_parameters, state_bytes
from ssa_pretrain.schedule import share_drawn

QUARTER, EIGHTH = Fraction(1, 4), Fraction(1, 8)
REAL_ROWS = 8  # of 8k; documents of real lengths differ so much that one microbatch is not a fair sample of them
USABLE = 0.7  # of the device's memory; the estimate leaves out temporary tensors and what the allocator holds split, up to one copy of the logits


def share_8k(config: Config, placement: Placement, vocab: int) -> list[Variant]:
    """Returns full, moba and ssa at 8k: one document per row, short documents, and documents of real lengths."""
    engine = MegatronEngine(config, placement, vocab)
    found = share_variants(engine, "8k", batches(config, placement, vocab, 1), (1, QUARTER, EIGHTH))
    short = batches(config, placement, vocab, 1, Documents.short)
    count = max(1, REAL_ROWS // config.training.micro_batch_size)
    real = batches(config, placement, vocab, count, Documents.real)
    for documents, packed in ((Documents.short, short), (Documents.real, real)):
        found += share_variants(engine, f"8k {documents}", packed, (1, QUARTER), count_flops=False)
    return found


def share_32k(config: Config, placement: Placement, vocab: int) -> list[Variant]:
    """Returns full, moba and ssa on rows of 32k: one document per row, and documents of real lengths."""
    long = long_rows(config, 4)
    engine = MegatronEngine(long, placement, vocab)
    real = batches(long, placement, vocab, REAL_ROWS // 4, Documents.real)
    return [
        *share_variants(engine, "32k", batches(long, placement, vocab, 1), (1, QUARTER, EIGHTH)),
        *share_variants(engine, "32k real", real, (1, QUARTER), count_flops=False),
    ]


def share_128k(config: Config, placement: Placement, vocab: int) -> list[Variant]:
    """Returns full, moba and ssa on one row of 128k, with as many of the model's layers as fit into the device's memory."""
    long = long_rows(config, 16)
    memory = None
    if placement.device.type == "cuda":
        memory = torch.cuda.get_device_properties(placement.device).total_memory
    layers = layers_that_fit(long, vocab, memory)
    cut = replace(long, model=replace(long.model, num_layers=layers))
    note = "" if layers == long.model.num_layers else f"{layers} of {long.model.num_layers} layers"
    engine = MegatronEngine(cut, placement, vocab)
    found = share_variants(engine, "128k", batches(cut, placement, vocab, 1), (1, QUARTER))
    return [replace(variant, model=note) for variant in found]


def layers_that_fit(config: Config, vocab_size: int, memory: int | None) -> int:
    """Returns how many of the model's layers fit, at least 1, by the plan's estimate.

    Args:
        config: the model and its microbatch.
        vocab_size: size of the vocabulary, before padding.
        memory: of the device, in bytes; None: all layers fit.
    """
    layers, padded = config.model.num_layers, config.model.padded_vocab_size(vocab_size)
    while memory is not None and layers > 1:
        cut = replace(config, model=replace(config.model, num_layers=layers))
        states = state_bytes(cut, *count_parameters(cut, padded), replicas=1)
        used = sum(states[f"{name}_bytes"] for name in ("weight", "gradient", "optimizer"))
        if used + activation_bytes(cut, padded, num_microbatches=1) <= USABLE * memory:
            break
        layers -= 1
    return layers


def share_variants(
    engine: MegatronEngine,
    rows: str,
    packed: Sequence[Batch],
    shares: Sequence[Fraction | int],
    *,
    count_flops: bool = True,
) -> list[Variant]:
    """Returns full, moba, and ssa at each share: with either main stream, and their mean.

    Args:
        engine: the model.
        rows: the rows' name in the variants' names.
        packed: the microbatches of a run.
        shares: values of attention.counterpart_share.
        count_flops: False for rows of several documents, whose operations are not counted: no MFU.
    """
    attention = engine.config.attention

    def work(trained: AttentionConfig) -> dict[str, Any]:
        known = work_of(replace(engine.config, attention=trained), engine.placement, len(packed))
        return known if count_flops else {**known, "flops": 0.0}

    def variant(name: str, **settings: Any) -> Variant:
        run = pass_over(with_attention(engine, **settings), list(packed))
        return Variant(name=f"share {name}", run=run, **work(replace(attention, **settings)))

    found = [variant(f"{method} {rows}", method=method) for method in (Method.full, Method.moba)]
    weights = (attention.full_ratio, 1.0 - attention.full_ratio)
    for share in shares:
        name = f"ssa r={share} {rows}"
        trained = replace(attention, method=Method.ssa, counterpart_share=float(share))
        kinds = []
        for main, forced in (("full", 1.0), ("sparse", 0.0)):
            drawn = {"full_ratio": forced, "counterpart_share": share_drawn(trained, main)}
            kinds.append(variant(f"{name}, main {main}", method=Method.ssa, **drawn))
        mean_of = dict(zip((kind.name for kind in kinds), weights, strict=True))
        found += [*kinds, Variant(name=f"share {name}", mean_of=mean_of, **work(trained))]
    return found
