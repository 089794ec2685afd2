"""One process of a test of held-out evaluation: on each layout, both modes over a dataset's held-out rows, with several micro-batch sizes, by the
engine that trains.

Arguments: a JSON file with the cases (name -> settings), the dataset's folder and the folder for results. A case's results are, for each
micro-batch size of SIZES, the metrics of both modes; then scores of texts and greedy continuations.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from megatron.core import parallel_state

from ssa_pretrain.engine import build_engine
from ssa_pretrain.evaluation import MODES
from ssa_pretrain.evaluation.generation import generate_greedily
from ssa_pretrain.evaluation.held_out import evaluate_mode
from ssa_pretrain.evaluation.scoring import score_requests
from ssa_pretrain.parallel.state import start
from ssa_pretrain.run import Run, build_run
from support.layout_worker import LENGTH, VOCAB, configure

SIZES = (1, 2, 3, 5)
SMALL = {"model.num_layers": 6, "evaluation.rows": 0}


def metrics(run: Run, mode: str) -> list[float]:
    """Returns the held-out metrics of a mode, and the labels and tokens that they are over."""
    found = evaluate_mode(run, mode)
    counts = [found.num_labels, found.num_tokens]
    return [found.cross_entropy, *found.alignment_by_layer, *found.captured_mass_by_layer, *counts]


def scores(run: Run, mode: str) -> list[float]:
    """Returns the scores of continuations and the tokens of greedy ones, with fewer microbatches than data ranks."""
    texts = [[(5 * i + j * j) % VOCAB for j in range(4 + 11 * i)] for i in range(4)]
    found = [
        score.log_likelihood for score in score_requests(run, [(text, [3, i]) for i, text in enumerate(texts)], mode)
    ]
    return found + [float(t) for new in generate_greedily(run, texts, mode=mode, num_new=3) for t in new]


def main() -> None:
    """Runs the cases in order."""
    cases, data, out = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2], Path(sys.argv[3])
    for name, settings in cases.items():
        config = configure(SMALL | {"data.path": data} | settings)
        placement = start(config.parallel, seed=1)
        config = replace(config, training=replace(config.training, global_batch_tokens=placement.dp * LENGTH))
        run = build_run(config, placement, trains=False)
        run.engine = build_engine(config, placement, VOCAB)  # as within a run that trains
        found = []
        for size in SIZES:
            run.config.training.micro_batch_size = size
            found.append([metrics(run, mode) for mode in MODES])
        written = {"held_out": found, "scores": [scores(run, mode) for mode in MODES]}
        (out / f"{name}.{placement.rank}.json").write_text(json.dumps(written))
        parallel_state.destroy_model_parallel()


if __name__ == "__main__":
    main()
