"""Entry point: EleutherAI's lm_eval on a model, in full and in sparse mode. By default all tasks of the paper.

    python -m ssa_pretrain.lm_eval exports/ssa_1b
    python -m ssa_pretrain.lm_eval exports/ssa_1b 'tasks=[arc_easy,wikitext]' 'modes=[sparse]'
    python -m ssa_pretrain.lm_eval outputs/ssa_1b_8k tasks=my_task.yaml include_path=my_tasks out=results.json

Takes a Hugging Face folder, or the folder of a run or a checkpoint, which is first exported to a temporary folder in bf16. Settings, as key=value:

    tasks         files of conf/lm_eval, without their ending; paper (default): all of them; or paths of other such files
    modes         [full,sparse] (default), [full] or [sparse]
    out           file of the results; must not exist; default FOLDER/lm_eval/TASKS.json
    seeds         seeds of the few-shot examples, instead of the files'
    batch_size    requests at once, instead of the files'
    limit         questions per task, to try something; default all
    include_path  folder of your own tasks, as lm_eval takes them
    device        such as cuda:1 or cpu; default the first GPU, or the CPU
    model_args    more arguments of lm_eval's hf model, such as model_args={dtype: float32, add_bos_token: true}

Exit codes: 0 done, 3 wrong settings, 4 no data of a task, 5 no checkpoint. Guide: docs/huggingface_models.md
"""

import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ssa_pretrain.errors import ExitCode
from ssa_pretrain.export import export_run
from ssa_pretrain.huggingface.harness_settings import LmEvalOptions, read_evaluations
from ssa_pretrain.huggingface.options import read_options, wants_help
from ssa_pretrain.process import rank_process
from ssa_pretrain.run_folder import unwritable
from ssa_pretrain.settings.problems import ConfigError, Problem


def main() -> None:
    """Reads the command line and evaluates."""
    with rank_process("interrupted", code=ExitCode.INTERRUPTED, signals=[signal.SIGINT]):
        evaluate(sys.argv[1:])


def evaluate(arguments: Sequence[str]) -> None:
    """Evaluates what a command line names, writes the results and prints a table.

    Raises:
        ConfigError: the command line, or a file of tasks, is wrong.
    """
    if wants_help(arguments):
        print(__doc__)
        return
    what = "an exported folder, a run's folder or a checkpoint"
    named, options = read_options(LmEvalOptions, "ssa_pretrain.lm_eval", what, arguments)
    evaluations = read_evaluations(options.tasks)
    out = Path(options.out or named / "lm_eval" / f"{'_'.join(Path(name).stem for name in options.tasks)}.json")
    if out.exists():
        raise ConfigError([Problem("out", str(out), "exists, and nothing is overwritten", "try another file")])
    if reason := unwritable(out.parent):
        raise ConfigError([Problem("out", str(out), reason, "try a file in another folder")])
    with exported(named) as folder:
        from ssa_pretrain.huggingface.harness import evaluate_folder, table

        record = evaluate_folder(folder, str(named), evaluations, options, out)
    print(f"{table(record)}\nwritten: {out}")


@contextmanager
def exported(named: Path) -> Iterator[Path]:
    """Yields a Hugging Face folder: the one that is named, or a temporary export of a run or a checkpoint."""
    if (named / "config.json").is_file():
        yield named
        return
    with tempfile.TemporaryDirectory(prefix="ssa_lm_eval_") as scratch:
        folder = Path(scratch) / "export"
        export_run([str(named), f"out={folder}"])
        yield folder


if __name__ == "__main__":
    main()
