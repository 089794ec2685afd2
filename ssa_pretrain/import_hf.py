"""Entry point: reads a Hugging Face folder into a run's folder, from which any layout and either engine starts.

    python -m ssa_pretrain.import_hf exports/quickstart out=imports/quickstart
    python -m ssa_pretrain.import_hf models/Llama-3.2-1B out=imports/llama gate=off
    python -m ssa_pretrain.import_hf models/SSA-1B out=imports/ssa_1b
    python -m ssa_pretrain.train experiment=convert_llama checkpoint.init_from=imports/llama data.path=DIR

Takes a folder with config.json and safetensors: an export of ssa_pretrain, a Llama of the third generation, a dense Qwen3, or a released model of SSA's
authors (SSA-1B, FullAttn-1B, MoBA-1B, NSA-1B). Settings, as key=value:

    out              folder of the imported model; must not exist
    name             name of the model; default that of `out`
    gate             for a Llama, which has no attention gate: off (the model stays without) or open (the same function, with gates that learn)
    method           attention.method in the folder's config.yaml: ssa (default), full, moba, indexer for an export with a trained scorer, or nsa for
                     NSA-1B and exports of nsa
    sequence_length  data.sequence_length there; default the longest input of config.json, at most 8192 for foreign models
    vocab_divisor    the embedding is padded to a multiple of this number of rows, with rows of 0; default: no padding
    data             data.path there, for `python -m ssa_pretrain.evaluate`; default: to be given then

Exit codes: 0 done, 3 wrong settings or a model that is not trained here, 5 the weights do not fit. Guide: docs/huggingface.md
"""

import os
import shlex
import signal
import sys
from collections.abc import Sequence

from ssa_pretrain.config import ParallelConfig
from ssa_pretrain.errors import ExitCode
from ssa_pretrain.huggingface.options import ImportOptions, as_arguments, attention_arguments, read_options, wants_help
from ssa_pretrain.libraries import hide_library_warnings, import_megatron_core
from ssa_pretrain.process import rank_process
from ssa_pretrain.settings.problems import ConfigError, Problem


def main() -> None:
    """Reads the command line and imports."""
    with rank_process(
        "interrupted; remove the folder named by out= and import again",
        code=ExitCode.INTERRUPTED,
        signals=[signal.SIGINT],
    ):
        import_model(sys.argv[1:])


def import_model(arguments: Sequence[str]) -> None:
    """Imports what a command line names.

    Raises:
        ConfigError: the model is not one that ssa_pretrain trains, or there are several processes.
    """
    if wants_help(arguments):
        print(__doc__)
        return
    folder, options = read_options(ImportOptions, "ssa_pretrain.import_hf", "a folder with config.json", arguments)
    if (world_size := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ConfigError(
            [
                Problem(
                    "WORLD_SIZE", world_size, "must be 1: one process reads the folder", "start it without a launcher"
                )
            ]
        )
    hide_library_warnings()
    import_megatron_core()
    from ssa_pretrain.huggingface.importing import import_folder, imported_config, read_record
    from ssa_pretrain.parallel.state import joined

    record = read_record(folder)
    config = imported_config(record, options)
    with joined(ParallelConfig(), seed=config.seed):
        checkpoint = import_folder(folder, record, config, options.gate)
    settings = shlex.join([*as_arguments("model", config.model), *attention_arguments(config.attention)])
    print(f"imported {folder}: {checkpoint}")
    print(f"start from it with checkpoint.init_from={options.out} and the model's settings:\n  {settings}")


if __name__ == "__main__":
    main()
