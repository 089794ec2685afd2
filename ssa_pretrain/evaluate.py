"""Entry point: evaluates a checkpoint in both modes, on held-out rows and tasks, and samples continuations.

    python -m ssa_pretrain.evaluate outputs/quickstart evaluation.rows=8
    python -m ssa_pretrain.evaluate outputs/quickstart@100 attention.top_k=8
    python -m ssa_pretrain.evaluate outputs/8k data.sequence_length=32768 model.rope_scaling.enabled=true
    python -m ssa_pretrain.evaluate experiment=quickstart

Takes the folder of a run, one of its checkpoints (its folder, or RUN@STEP), or the run's own command line. With a folder or a checkpoint, the run's
`config.yaml` is the configuration, and settings that follow replace its values. Results are written into the run's folder, or into another
output_dir. Only what decides the weights must be as in training. Blocks, row length, RoPE and data may differ, and the results record them
(evaluation/results.py). A checkpoint of either engine loads on any layout, so one process can evaluate a run that many processes trained, without an
optimizer. The metrics depend neither on the layout nor on training.micro_batch_size.
evaluation.rows sets the number of held-out rows; 0 means all.
"""

import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssa_pretrain.config import Config
from ssa_pretrain.errors import CheckpointError, ExitCode
from ssa_pretrain.libraries import hide_library_warnings, import_megatron_core
from ssa_pretrain.process import rank_process

if TYPE_CHECKING:
    from ssa_pretrain.run import Run


def main() -> None:
    """Reads the command line, evaluates, samples, and writes the results."""
    interrupted = "interrupted; the same command evaluates again"
    with rank_process(interrupted, code=ExitCode.INTERRUPTED, signals=[signal.SIGINT]):
        from ssa_pretrain.cli import read_config
        from ssa_pretrain.saved_run import named_checkpoint

        checkpoint = named_checkpoint(sys.argv[1:])
        config = read_config("evaluate")
        hide_library_warnings()
        import_megatron_core()
        evaluate_run(config, checkpoint)


def evaluate_run(config: Config, checkpoint: Path | None = None, *, samples: bool = True) -> None:
    """Evaluates a checkpoint, or the newest one of a run, by default output_dir's, and samples from it unless told not to. Every rank calls this."""
    from ssa_pretrain.checkpoint.facts import tokens_trained_on
    from ssa_pretrain.checkpoint.find import require_same_model
    from ssa_pretrain.checkpoint.weights import ema_weights
    from ssa_pretrain.evaluation import MODES, results
    from ssa_pretrain.evaluation.sampling import sample
    from ssa_pretrain.evaluation.table import table
    from ssa_pretrain.evaluation.tasks import build_tasks
    from ssa_pretrain.parallel.agreement import on_rank_0
    from ssa_pretrain.parallel.state import joined
    from ssa_pretrain.resume import newest_checkpoint, warn_of_another_tokenizer
    from ssa_pretrain.run import build_run
    from ssa_pretrain.settings.problems import ConfigError

    # User buffers have the shape of a training microbatch, and packed prompts have another shape.
    config = replace(config, engine=replace(config.engine, overlap_tp=False))
    with joined(config.parallel, seed=config.seed) as placement:
        # The plan needs a batch of whole microbatches. On this layout the training run's batch may not divide evenly.
        rows = placement.dp * config.training.micro_batch_size
        tokens = rows * config.data.sequence_length
        batch = replace(config.training, global_batch_tokens=tokens, batch_steps=[])
        run = build_run(replace(config, training=batch), placement, trains=False)
        found = newest_checkpoint(run, checkpoint)
        if found is None:
            raise CheckpointError(
                f"{checkpoint or run.folder} holds no checkpoint; give the folder of a run that has saved one"
            )
        require_same_model(found, run.contract(), shapes_only=True)
        warn_of_another_tokenizer(run, found)
        settings = results.settings_of(run, found)
        name = results.result_name(settings, config.evaluation.name)

        def require_own() -> None:
            results.require_own(run.folder, name, settings)

        on_rank_0(require_own, is_rank_0=placement.is_rank_0, errors=(ConfigError,))
        run.tasks = build_tasks(run)
        run.engine.load_weights(ema_weights(found.folder) if config.evaluation.ema else found.folder)
        result: dict[str, Any] = {
            "settings": settings,
            "trained_with": results.trained_with(run, found),
            "step": found.step,
            "tokens": tokens_trained_on(found.facts, found.step),
            "split": "heldout",
            "rows": run.held_out.num_rows,
            **measure(run),
        }
        texts = sample(run, MODES) if samples else []
        if placement.is_rank_0:
            path = results.write_result(run, name, result, texts)
            show(run, result | {"name": name}, path)
            run.print(table(result))
            run.print(f"results: {path} and {path.with_suffix('.png').name}")


def measure(run: "Run") -> dict[str, Any]:
    """Returns everything that is measured, by what and mode; every rank calls it."""
    from ssa_pretrain.evaluation import MODES
    from ssa_pretrain.evaluation.bound import bound_by_layer
    from ssa_pretrain.evaluation.heads import attention_by_head
    from ssa_pretrain.evaluation.held_out import evaluate_mode
    from ssa_pretrain.evaluation.scoring import tokenizer_of
    from ssa_pretrain.evaluation.text_size import perplexities, text_size

    isolated, head_rows = run.config.data.isolate_documents, run.config.evaluation.head_rows
    bound_rows = run.config.evaluation.bound_rows
    size = text_size(run.held_out, tokenizer_of(run), isolate_documents=isolated)
    modes, heads, bound, tasks = {}, {}, {}, {task.name: {} for task in run.tasks}
    for mode in MODES:
        found = evaluate_mode(run, mode)
        modes[mode] = asdict(found) | perplexities(found, size)
        run.print(f"held-out, {mode:<6}: cross entropy {found.cross_entropy:.4f}")
        heads[mode] = attention_by_head(run, mode, head_rows) if head_rows else {}
        bound |= {mode: bound_by_layer(run, mode, bound_rows)} if bound_rows else {}
        for task in run.tasks:
            tasks[task.name][mode] = asdict(task.evaluate(run, mode))
    found_bound = {"bound": bound} if bound else {}
    return {"modes": modes, "heads": heads, **found_bound, "tasks": tasks, **lm_eval_results(run)}


def lm_eval_results(run: "Run") -> dict[str, Any]:
    """Returns the results of lm_eval's tasks, empty if none is asked for. lm_eval is imported only then."""
    if not run.config.evaluation.lm_eval.tasks:
        return {"lm_eval": {}}
    from ssa_pretrain.evaluation.lm_eval_model import evaluate_tasks

    return evaluate_tasks(run)


def show(run: "Run", result: dict[str, Any], path: Path) -> None:
    """Draws the results and sends them to W&B, as an own W&B run beside that of the training; rank 0 calls it."""
    from ssa_pretrain.evaluation.plots import plot
    from ssa_pretrain.evaluation.records import records
    from ssa_pretrain.monitor.tracking import start_tracking

    plot(result, path.with_suffix(".png"))
    tracker = start_tracking(
        run.config.logging.wandb,
        name=f"{run.config.name}, {result['name']}",
        folder=path.with_suffix(".wandb"),
        config=result["settings"] | {"trained_with": result["trained_with"]},
        print_line=run.print,
    )
    if tracker:
        for record in records(result):
            tracker.log(record)
        tracker.finish()


if __name__ == "__main__":
    main()
