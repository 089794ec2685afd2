"""One process of test_context.py, started by torchrun: some steps of each case under a parallel.cp.

    torchrun --standalone --nproc-per-node 2 tests/gpu/context_worker.py FILE 2

Rank 0 writes, for each case, every step's results and the first step's gradients.
"""

import sys
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import torch
import torch.distributed as dist

from ssa_pretrain.config import (
    AttentionConfig,
    Config,
    IndexerConfig,
    KernelImpl,
    Method,
    PrecisionName,
    Recompute,
    Score,
)
from ssa_pretrain.data.batches import Batch, collate
from ssa_pretrain.engine import build_engine
from ssa_pretrain.parallel.state import start, stop
from support.layout_worker import capture_first_gradients, free_memory, rows_with_documents

VOCAB, LENGTH, STEPS = 1024, 2048, 4
# Documents over both ranks' borders (512, 1024, 1536 and around), of one token, and a row of one document.
STARTS = ((0, 511, 512, 513, 1023, 1500), (0,), (0, 1, 700, 1024, 2047), (0, 1535, 1537))


ATTENTION = {
    "ssa_full": AttentionConfig(full_ratio=1.0),
    "ssa_sparse": AttentionConfig(full_ratio=0.0),
    "ssa_quarter": AttentionConfig(counterpart_share=0.25),
    "full": AttentionConfig(method=Method.full),
    "moba": AttentionConfig(method=Method.moba),
    "indexer": AttentionConfig(
        method=Method.indexer,
        score=Score.indexer,
        full_ratio=0.0,
        counterpart_share=0.5,
        indexer=IndexerConfig(warmup_steps=0),
    ),
    "nsa": AttentionConfig(method=Method.nsa, score=Score.compressed),
}
assert {attention.method for attention in ATTENTION.values()} == set(Method)


def cases() -> dict[str, Config]:
    """Returns the configurations by name: fp32 by the references, bf16 and FP8 by the kernels."""
    found = {}
    for method, attention in ATTENTION.items():
        for precision in PrecisionName:
            if precision is PrecisionName.fp8 and not find_spec("transformer_engine"):
                continue
            impl = KernelImpl.reference if precision is PrecisionName.fp32 else KernelImpl.auto
            for recompute in (Recompute.none, Recompute.selective, Recompute.full):
                if recompute is not Recompute.none and (precision is PrecisionName.fp8 or method == "ssa_full"):
                    continue
                config = Config(attention=replace(attention, impl=impl))
                model = config.model
                model.num_layers, model.hidden_size, model.ffn_hidden_size = 2, 256, 512
                model.num_attention_heads, model.num_kv_heads, model.head_dim = 16, 2, 64
                model.init_std = 0.1
                config.data.sequence_length = LENGTH
                config.engine.recompute, config.precision.name = recompute, precision
                config.optim.eps = 1e-2  # far above rounding: the first steps divide by the gradient's size
                found[f"{precision}.{method}.{recompute}"] = config
    return found


def batches(step: int) -> list[Batch]:
    """Returns a step's microbatches."""
    rows = rows_with_documents(STARTS, np.random.default_rng(step), length=LENGTH, vocab=VOCAB)
    return [collate([row], index=index) for index, row in enumerate(rows)]


def run_case(config: Config, placement) -> dict:
    """Returns a case's results and gradients."""
    engine = build_engine(config, placement, VOCAB)
    captured = capture_first_gradients(engine)
    results, evaluated = [], []
    for index in range(STEPS):
        found = engine.train_step(batches(index), step=index, learning_rate=1e-2).result()
        layers = [*found.alignment_by_layer, *found.captured_mass_by_layer, *found.index_loss_by_layer]
        results.append([found.cross_entropy, found.grad_norm, *layers])
    for mode in ("full", "sparse"):
        judged = engine.evaluate(batches(99), mode=mode)
        evaluated.append([judged.cross_entropy, *judged.alignment_by_layer, *judged.captured_mass_by_layer])
    return {
        "results": results,
        "evaluated": evaluated,
        "gradients": {name: part["grad"].cpu() for name, part in captured.items()},
    }


def main() -> None:
    """Runs all cases."""
    config = Config()
    config.parallel.cp = int(sys.argv[2])
    placement = start(config.parallel, seed=1)
    results = {}
    for name, case in cases().items():
        case.parallel.cp = config.parallel.cp
        results[name] = run_case(case, placement)
        free_memory()
    if placement.is_rank_0:
        torch.save(results, sys.argv[1])
    dist.barrier()
    stop()


if __name__ == "__main__":
    main()
