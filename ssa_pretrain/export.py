"""Entry point: writes a checkpoint as a Hugging Face folder, which transformers, lm_eval and vLLM load.

    python -m ssa_pretrain.export outputs/quickstart out=exports/quickstart dtype=fp32
    python -m ssa_pretrain.export outputs/ssa_1b_8k@31800 out=exports/ssa_1b
    torchrun --standalone --nproc-per-node 4 -m ssa_pretrain.export outputs/ssa_1b_8k out=exports/ssa_1b

Takes the folder of a run, whose newest intact checkpoint is exported, or one of its checkpoints (RUN@STEP): of either engine, of any layout, and on any
number of processes, which share the files. Settings, as key=value:

    out             folder of the export; must not exist
    weights         live (default) or ema: the running mean of the weights (optim.ema_decay)
    dtype           bf16 (default) or fp32: number format of the weights
    attention_mode  full or sparse: what the model computes unless asked otherwise; default full, sparse after method=moba, nsa
                    or indexer
    max_shard_size  largest file of weights, default 5GB
    data            dataset whose tokenizer is exported; default the run's own; none: export no tokenizer
    add_bos         whether the tokenizer puts BOS before each text; default: as in training
    check           true: load the export with transformers and compare its logits with the training model's; one process

Exit codes: 0 done, 3 wrong settings, 4 no tokenizer, 5 no checkpoint, or the check failed. Guide: docs/huggingface.md
"""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from ssa_pretrain.config import Config
from ssa_pretrain.errors import ExitCode
from ssa_pretrain.huggingface.options import ExportOptions, read_options, wants_help
from ssa_pretrain.libraries import hide_library_warnings, import_megatron_core
from ssa_pretrain.process import rank_process
from ssa_pretrain.saved_run import find_run_folder
from ssa_pretrain.settings.convert import load_config
from ssa_pretrain.settings.problems import ConfigError, Problem


def main() -> None:
    """Reads the command line and exports."""
    with rank_process(
        "interrupted; the same command exports again", code=ExitCode.INTERRUPTED, signals=[signal.SIGINT]
    ):
        export_run(sys.argv[1:])


def export_run(arguments: Sequence[str]) -> None:
    """Exports what a command line names. Every rank calls this.

    Raises:
        ConfigError: the command line, or the run's configuration, is wrong.
    """
    if wants_help(arguments):
        print(__doc__)
        return
    named, options = read_options(
        ExportOptions, "ssa_pretrain.export", "the folder of a run or a checkpoint", arguments
    )
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if options.check and world_size > 1:
        raise ConfigError([Problem("check", True, f"needs one process, and there are {world_size}", "leave it out")])
    run_folder = find_run_folder(str(named))
    config = load_config(Config, run_folder / "config.yaml")
    hide_library_warnings()
    import_megatron_core()
    from ssa_pretrain.huggingface.exporting import DTYPES, export, layout_for
    from ssa_pretrain.parallel.state import joined

    checkpoint = named if named != run_folder else None
    with joined(layout_for(config, world_size), seed=config.seed) as placement:
        source = export(run_folder, checkpoint, config, placement, options)
        if placement.is_rank_0:
            print(f"exported step {source.checkpoint.step} of {run_folder} as {options.dtype.value}: {options.out}")
        if options.check:
            from ssa_pretrain.huggingface.checking import check_export

            print(check_export(Path(options.out), config, source.weights, DTYPES[options.dtype], placement))


if __name__ == "__main__":
    main()
