"""Entry point: evaluates the newest checkpoint of a run on held-out rows in both modes, and samples continuations.

    python -m ssa_pretrain.evaluate outputs/quickstart evaluation.rows=8
    python -m ssa_pretrain.evaluate outputs/quickstart/checkpoints/step_00000100
    python -m ssa_pretrain.evaluate experiment=quickstart

Takes the folder of a run, one of its checkpoints, or the run's own command line. With a folder or a checkpoint, the run's
`config.yaml` is the configuration. A checkpoint loads on any layout, so one process can evaluate a run that many processes trained.
The metrics depend neither on the layout nor on training.micro_batch_size. evaluation.rows sets the number of held-out rows; 0 means
all. Writes `evaluation.json` and `samples.json` into the run's folder. A prompt and its continuation together have at most as many
tokens as a row.
"""

import json
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path

from ssa_pretrain.config import Config
from ssa_pretrain.errors import CheckpointError, ExitCode
from ssa_pretrain.process import hide_library_warnings, rank_process
from ssa_pretrain.settings.files import write_atomically


def main() -> None:
    """Reads the command line, evaluates, samples, and writes the results."""
    interrupted = "interrupted; the same command evaluates again"
    with rank_process(interrupted, code=ExitCode.INTERRUPTED, signals=[signal.SIGINT]):
        from ssa_pretrain.cli import read_config
        from ssa_pretrain.saved_run import named_checkpoint

        checkpoint = named_checkpoint(sys.argv[1:])
        config = read_config("evaluate")
        hide_library_warnings()
        evaluate_run(config, checkpoint)


def evaluate_run(config: Config, checkpoint: Path | None = None) -> None:
    """Evaluates a checkpoint of a run, by default its newest, and samples from it. Every rank calls this."""
    from ssa_pretrain.checkpoint.publish import require_same_model
    from ssa_pretrain.evaluation import MODES, evaluate_mode
    from ssa_pretrain.parallel.state import joined
    from ssa_pretrain.resume import newest_checkpoint, warn_of_another_tokenizer
    from ssa_pretrain.run import build_run
    from ssa_pretrain.sampling import sample

    # User buffers have the shape of a training microbatch, and packed prompts have another shape.
    config = replace(config, engine=replace(config.engine, overlap_tp=False))
    with joined(config.parallel, seed=config.seed) as placement:
        # The plan needs a batch of whole microbatches. On this layout the training run's batch may not divide evenly.
        rows = placement.dp * config.training.micro_batch_size
        batch = replace(config.training, global_batch_tokens=rows * config.data.sequence_length)
        run = build_run(replace(config, training=batch), placement, trains=False)
        found = newest_checkpoint(run, checkpoint)
        if found is None:
            raise CheckpointError(f"{run.folder} holds no checkpoint; give the folder of a run that has saved one")
        require_same_model(found, run.contract())
        warn_of_another_tokenizer(run, found)
        run.engine.load_weights(found.folder)
        metrics = {}
        for mode in MODES:
            metrics[mode] = asdict(evaluate_mode(run, mode))
            run.print(f"held-out, {mode:<6}: cross entropy {metrics[mode]['cross_entropy']:.4f}")
        tokens = found.step * found.facts["training.global_batch_tokens"]
        results = {"step": found.step, "tokens": tokens, "split": "heldout", "rows": run.held_out.num_rows}
        if placement.is_rank_0:
            write_json(run.folder / "evaluation.json", results | {"modes": metrics})
        samples = sample(run, MODES)
        if placement.is_rank_0:
            write_json(run.folder / "samples.json", samples)


def write_json(path: Path, value: object) -> None:
    """Writes a value as JSON."""
    write_atomically(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
