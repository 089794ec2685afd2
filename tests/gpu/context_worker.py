"""One process of test_context.py, started by torchrun: some steps of each case under a parallel.cp.

    torchrun --standalone --nproc-per-node 2 tests/gpu/context_worker.py FILE 2

Rank 0 writes, for each case, every step's results and the first step's gradients.
"""

import sys

import numpy as np
import torch
import torch.distributed as dist

from ssa_pretrain.config import Config, KernelImpl, Method, PrecisionName, Recompute, Score
from ssa_pretrain.data.batches import Batch, collate
from ssa_pretrain.engine import build_engine
from ssa_pretrain.parallel.state import start, stop
from support.layout_worker import capture_first_gradients, rows_with_documents

VOCAB, LENGTH, STEPS = 1024, 2048, 4
# Documents over both ranks' borders (512, 1024, 1536 and around), of one token, and a row of one document.
STARTS = ((0, 511, 512, 513, 1023, 1500), (0,), (0, 1, 700, 1024, 2047), (0, 1535, 1537))


def cases() -> dict[str, Config]:
    """Returns the configurations by name: fp32 by the references, bf16 and FP8 by the kernels."""
    found = {}
    for method in Method:
        for ratio in (0.0, 1.0) if method is Method.ssa else (0.5,):
            for precision in PrecisionName:
                impl = KernelImpl.reference if precision is PrecisionName.fp32 else KernelImpl.auto
                for recompute in (Recompute.none, Recompute.selective, Recompute.full):
                    if precision is PrecisionName.fp8 and recompute is not Recompute.none:
                        continue
                    if recompute is not Recompute.none and ratio == 1.0:
                        continue
                    config = Config()
                    model = config.model
                    model.num_layers, model.hidden_size, model.ffn_hidden_size = 2, 256, 512
                    model.num_attention_heads, model.num_kv_heads, model.head_dim = 16, 2, 64
                    model.init_std = 0.1
                    config.attention.method, config.attention.full_ratio, config.attention.impl = method, ratio, impl
                    if method is Method.nsa:
                        config.attention.score = Score.compressed
                    config.data.sequence_length = LENGTH
                    config.engine.recompute, config.precision.name = recompute, precision
                    config.optim.eps = 1e-2  # far above rounding: the first steps divide by the gradient's size
                    found[f"{precision}.{method}.{ratio}.{recompute}"] = config
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
        results.append([found.cross_entropy, found.grad_norm, *found.alignment_by_layer, *found.captured_mass_by_layer])
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
    if placement.is_rank_0:
        torch.save(results, sys.argv[1])
    dist.barrier()
    stop()


if __name__ == "__main__":
    main()
