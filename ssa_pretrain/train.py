"""Entry point: `python -m ssa_pretrain.train experiment=quickstart`, or the same under torchrun.

The configuration is checked, and `--help`, `--cfg job` and `dry_run=true` are answered, before torch is imported. Rerunning a command goes on
from its newest checkpoint. Exit codes: 0 done, 3 configuration, 4 data, 5 checkpoint, 6 a loss or gradient that is not finite, 7 stopped by
SIGTERM, Ctrl-C or SIGHUP with a checkpoint, or before there was anything to save.
"""

from ssa_pretrain.process import leave, quieten_libraries, rank_process


def main() -> None:
    """Reads the command line and trains."""
    with rank_process("stopped before training began; the same command starts it again"):
        from ssa_pretrain.cli import read_config

        config = read_config("train")
        quieten_libraries()
        from ssa_pretrain.checkpoint import CheckpointError
        from ssa_pretrain.data.errors import DataError
        from ssa_pretrain.parallel.interruption import Interrupted
        from ssa_pretrain.settings.problems import ConfigError
        from ssa_pretrain.signals import STOPPED
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
            leave(error, STOPPED)


if __name__ == "__main__":
    main()
