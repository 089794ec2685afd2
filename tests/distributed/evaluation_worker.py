"""One process of a test of checkpoints' evaluation: saves a checkpoint on each layout, or evaluates every checkpoint on this one.

Arguments: a JSON file with the cases (name -> settings of the layout), the dataset's folder, the folder for results, and `save` or `evaluate`. Under
`save`, each case trains a step, saves, and evaluates its checkpoint on its own layout; under `evaluate`, with the settings of `EVALUATED`.
"""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state

from ssa_pretrain.engine import build_engine
from ssa_pretrain.evaluation import MODES
from ssa_pretrain.evaluation.generation import generate_greedily
from ssa_pretrain.evaluation.heads import attention_by_head
from ssa_pretrain.evaluation.held_out import evaluate_mode
from ssa_pretrain.evaluation.scoring import score_requests
from ssa_pretrain.parallel.state import Placement, start
from ssa_pretrain.run import build_run
from support.layout_worker import LENGTH, VOCAB, batches, configure

SMALL = {"model.num_layers": 2, "evaluation.rows": 0, "training.micro_batch_size": 2}
LONG = 8 * LENGTH


def save(config, placement: Placement, folder: Path) -> None:
    """Trains a step and writes a checkpoint like the trainer."""
    engine = build_engine(config, placement, VOCAB)
    engine.train_step(batches(config, placement.dp_rank, placement.dp, 0), step=0, learning_rate=1e-2).result()
    if placement.is_rank_0:
        folder.mkdir()
    dist.barrier()
    engine.save(folder)
    engine.save_weights(folder)


def judge(config, placement: Placement, folder: Path) -> dict:
    """Returns what an evaluation finds: metrics, heads, scores of requests and generated tokens, by mode."""
    whole = placement.dp * config.training.micro_batch_size * LENGTH
    config = replace(config, training=replace(config.training, global_batch_tokens=whole))
    run = build_run(config, placement, trains=False)
    run.engine.load_weights(folder)
    texts = [[(7 * i + j * j) % VOCAB for j in range(5 + 9 * i)] for i in range(8)]
    requests = [(text, [(i * k + 1) % VOCAB for k in range(1 + i % 4)]) for i, text in enumerate(texts)]
    found = {}
    for mode in MODES:
        scores = score_requests(run, requests, mode)
        found[mode] = {
            "held_out": asdict(evaluate_mode(run, mode)),
            "heads": attention_by_head(run, mode, 3),
            "scores": [score.log_likelihood for score in scores],
            "greedy": [score.is_greedy for score in scores],
            "generated": generate_greedily(run, texts, mode=mode, num_new=6),
        }
    return found


def main() -> None:
    """Runs the cases in order."""
    cases, data, out, act = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2], Path(sys.argv[3]), sys.argv[4]
    for name, settings in cases.items():
        config = configure(SMALL | {"data.path": data, "training.global_batch_tokens": LONG} | settings)
        placement = start(config.parallel, seed=1)
        if act == "save":
            save(config, placement, out / name)
        found = judge(config, placement, out / name)
        (out / f"{name}.{act}.{placement.rank}.json").write_text(json.dumps(found))
        parallel_state.destroy_model_parallel()


if __name__ == "__main__":
    main()
