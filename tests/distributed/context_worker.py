"""The processes of the context-parallel tests: like layout_worker.py, with documents at awkward places and four more steps.

Arguments: a JSON file with the cases (name -> configuration overrides) and the folder for results. A row of 96 tokens is cut at 24, 48 and 72 for two context ranks and every 12 tokens for four, in blocks of 16: only one cut lies on the block grid.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ssa_pretrain.config import Config
from ssa_pretrain.data.batches import Batch, collate
from ssa_pretrain.data.rows import Row
from ssa_pretrain.engine import build_engine
from ssa_pretrain.parallel.context import ContextParallel
from ssa_pretrain.parallel.state import Placement
from support.layout_worker import VOCAB, by_part, capture_first_gradients, collated, rows_with_documents, run_cases

STEPS = 4
# Where documents begin in each row of a step. Single tokens at the row's ends and on both sides of the ranks' borders; one document over all
# ranks; documents that begin and end at a border; borders one off.
STARTS = ((0,), (0, 1, 23, 24, 25, 95), (0, 11, 12, 13, 47, 72, 90), (0, 2, *range(30, 50), 71, 73))
PADDING = 20  # tokens of the last row, of its label too


def packed_rows(seed: int) -> list[Row]:
    """Returns random tokens in the documents of STARTS, and padding at the end of the last row."""
    rows = rows_with_documents(STARTS, np.random.default_rng(seed))
    rows[-1].tokens[-PADDING:] = 0
    rows[-1] = replace(rows[-1], padding=PADDING)
    return rows


def batches(config: Config, dp_rank: int, dp: int, step: int) -> list[Batch]:
    """Returns this data rank's microbatches of the global batch, before they are split over context ranks."""
    return collated(packed_rows(step), config, dp_rank, dp)


def run_case(name: str, config: Config, placement: Placement, out: Path) -> None:
    """Runs four steps, evaluates, computes logits, runs a fifth step from a checkpoint if the case asks for it, and writes this rank's results."""
    engine = build_engine(config, placement, VOCAB)
    records, captured = [], capture_first_gradients(engine)

    def train(index: int) -> list[float]:
        mine = batches(config, placement.dp_rank, placement.dp, index)
        found = engine.train_step(mine, step=index, learning_rate=1e-2).result()
        layers = [*found.alignment_by_layer, *found.captured_mass_by_layer, *found.index_loss_by_layer]
        return [found.cross_entropy, found.grad_norm, *layers, *by_part(found, batches(config, 0, 1, index))]

    records += [train(index) for index in range(STEPS)]
    held_out = batches(config, placement.dp_rank, placement.dp, 99)[
        : 2 // (placement.dp * config.training.micro_batch_size)
    ]
    evaluated = []
    for mode in ("full", "sparse"):
        judged = engine.evaluate(held_out, mode=mode)
        evaluated.append([judged.cross_entropy, *judged.alignment_by_layer, *judged.captured_mass_by_layer])
    logits = engine.last_logits(collate(packed_rows(7)[1:2], index=0), mode="sparse")
    checkpoint = out / "checkpoint"
    if name.endswith(".plain.ssa_full"):  # other layouts must be able to go on from the single process's checkpoint
        if placement.world_size == 1:
            checkpoint.mkdir()
            engine.save(checkpoint)
        else:
            engine.load(checkpoint)
        records.append(train(STEPS))
    part = {
        "records": records,
        "evaluated": evaluated,
        "logits": logits,
        "parameters": captured,
        "tp_rank": placement.tp_rank,
    }
    torch.save(part, out / f"{name}.{placement.rank}.pt")


def check_gradient_sum_precision(context: ContextParallel, device: torch.device) -> None:
    """Checks that gradients are summed in fp32: rank 0 has 256 and the others 1, which a bf16 sum would lose (its step at 256 is 2)."""
    k = torch.zeros(2, 1, 4, dtype=torch.bfloat16, device=device, requires_grad=True)
    whole, _ = context.gather(k, k.detach())
    whole.backward(torch.full_like(whole, 256.0 if context.rank == 0 else 1.0))
    assert k.grad is not None and k.grad.dtype == torch.bfloat16
    wanted = torch.tensor(256.0 + context.size - 1).bfloat16()
    assert wanted != 256.0 and torch.equal(k.grad, torch.full_like(k.grad, float(wanted))), k.grad


def check_gather_order(context: ContextParallel, device: torch.device) -> None:
    """Checks that gathering restores what was split, and that each token's gradient is the sum over all ranks."""
    tokens = 8 * context.size
    whole = torch.arange(tokens * 6, dtype=torch.float64, device=device).view(tokens, 2, 3)
    batch = Batch(0, *(torch.arange(tokens)[None] for _ in range(3)), torch.arange(tokens), torch.tensor([0, tokens]))
    mine = context.split(batch).to(device)
    assert mine.tokens.shape == (1, 8) and torch.equal(mine.positions, mine.tokens[0])
    k, v = whole[mine.positions].requires_grad_(), (-whole[mine.positions]).requires_grad_()
    k_all, v_all = context.gather(k, v)
    assert torch.equal(k_all, whole) and torch.equal(v_all, -whole)
    ((context.rank + 1) * (k_all * whole).sum() + (v_all * 5).sum()).backward()
    assert torch.equal(k.grad, whole[mine.positions] * sum(range(1, context.size + 1)))
    assert torch.equal(v.grad, torch.full_like(v, 5.0 * context.size))
    found = context.values_at(
        mine.tokens[0][:, None] * 10, torch.tensor([tokens - 1, 0, 7, 7, tokens // 2], device=device), tokens
    )
    assert found.flatten().tolist() == [10 * p for p in (tokens - 1, 0, 7, 7, tokens // 2)]


def check_context(placement: Placement) -> None:
    """Checks the context-parallel operations of a layout before its cases run."""
    context = ContextParallel(placement.groups.cp)
    check_gather_order(context, placement.device)
    if context.size == 4:
        check_gradient_sum_precision(context, placement.device)


if __name__ == "__main__":
    run_cases(run_case, check_context)
