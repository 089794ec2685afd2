"""Entry point: `python -m ssa_pretrain.train experiment=quickstart`, or the same under torchrun.

The configuration is checked, and `--help`, `--cfg job` and `dry_run=true` are answered, before torch is imported. Rerunning a command goes on
from its newest checkpoint. Exit codes: 0 done, 3 configuration, 4 data, 5 checkpoint, 6 a loss or gradient that is no finite number, 7 stopped by
SIGTERM with a checkpoint.
"""

import logging
import os
import socket
import sys
import warnings
from pathlib import Path

from ssa_pretrain.cli import read_config

FIRST_SECONDS = 15.0  # for the first rank to end its log (W&B takes up to eleven) and to say why the run ends


def main() -> None:
    """Read the command line and train."""
    config = read_config("train")
    quieten_libraries()
    from ssa_pretrain.checkpoint import CheckpointError
    from ssa_pretrain.data.errors import DataError
    from ssa_pretrain.parallel.interruption import Interrupted
    from ssa_pretrain.problems import ConfigError
    from ssa_pretrain.trainer import DivergedError, train
    from ssa_pretrain.weights import WeightsError

    try:
        train(config)
    except (CheckpointError, WeightsError) as error:
        leave(error, 5)
    except DataError as error:
        leave(error, 4)
    except ConfigError as error:
        leave(error, error.exit_code)
    except DivergedError as error:
        leave(error, 6)
    except Interrupted as error:
        leave(error, 7)
    mark_end()


def mark_end() -> None:
    """Leave a mark for a launcher that asked for one: DeepSpeed's exit code does not tell a finished run from a killed one."""
    mark = os.environ.get("SSA_PRETRAIN_END_MARK")
    if mark and os.environ.get("RANK", "0") == "0":
        Path(mark).write_text("done\n")


def leave(error: Exception, code: int) -> None:
    """Say what is wrong, once a node, and exit without waiting for other ranks' work, which may never end.

    What every rank has to say the first one says first: a launcher ends it as soon as another has left. What one rank alone met has
    `of_one_rank`, and is its to say at once.
    """
    rank, alone = os.environ.get("RANK", "0"), getattr(error, "of_one_rank", False)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        print(error, file=sys.stderr, flush=True)
        sys.exit(code)
    from ssa_pretrain.parallel.agreement import end_process, first_has_spoken

    if rank == "0":
        print(error, file=sys.stderr, flush=True)
    first_has_spoken(is_first=rank == "0", seconds=0.0 if alone else FIRST_SECONDS)
    if rank != "0" and (alone or os.environ.get("LOCAL_RANK") == "0"):
        print(f"rank {rank} ({socket.gethostname()}): {error}", file=sys.stderr, flush=True)
    end_process(code)


def quieten_libraries() -> None:
    """Hide megatron-core's remarks on optional packages and settings; what matters of them is in the banner."""
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)  # "Unknown MLP type": ours


if __name__ == "__main__":
    main()
