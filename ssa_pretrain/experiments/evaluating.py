"""The process that evaluates one run's newest checkpoint several times: `python -m ssa_pretrain.experiments.evaluating RUN -- NAME key=value … -- NAME …`.

Each evaluation is that of `ssa_pretrain.evaluate` without samples, and writes RUN/evaluations/NAME.json. The libraries are loaded once. A result of that name
of another step is replaced. One that fails is reported, and the others continue; the exit code is that of the last failure.
"""

import gc
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ssa_pretrain.errors import CommandError, ExitCode
from ssa_pretrain.libraries import hide_library_warnings, import_megatron_core
from ssa_pretrain.process import rank_process


def main() -> None:
    """Reads the command line and evaluates."""
    interrupted = "interrupted; the same command evaluates what has no result yet"
    signals = [signal.SIGINT, signal.SIGTERM]
    with rank_process(interrupted, code=ExitCode.INTERRUPTED, signals=signals):
        folder, *asked = split(sys.argv[1:])
        hide_library_warnings()
        import_megatron_core()
        codes = [evaluate(Path(folder[0]), name, overrides) for name, *overrides in asked]
        sys.exit(next((code for code in reversed(codes) if code), ExitCode.DONE))


def free_memory() -> None:
    """Gives the last model's memory back, because other processes share the GPU."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def split(words: Sequence[str]) -> list[list[str]]:
    """Returns the words between each two `--`."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word == "--":
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def evaluate(folder: Path, name: str, overrides: Sequence[str]) -> int:
    """Evaluates once and returns the exit code of its failure, else 0."""
    from ssa_pretrain.cli import resolve_config
    from ssa_pretrain.config.machine import this_machine
    from ssa_pretrain.evaluate import evaluate_run
    from ssa_pretrain.saved_run import expand

    unchecked = dict.fromkeys(("has_deepspeed", "has_wandb", "has_tensorboard", "has_trackio"))
    machine = replace(this_machine(), entry="evaluate", splits=("heldout",), **unchecked)
    print(f"{name}: {' '.join(overrides)}", flush=True)
    try:
        (folder / "evaluations" / f"{name}.json").unlink(missing_ok=True)
        given, _ = expand([str(folder), *overrides, f"evaluation.name={name}"], 1)
        evaluate_run(resolve_config("evaluate", given, machine), samples=False)
    except CommandError as error:
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        return int(error.exit_code)
    finally:
        free_memory()
    return ExitCode.DONE


if __name__ == "__main__":
    main()
