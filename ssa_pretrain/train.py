"""Entry point: `python -m ssa_pretrain.train experiment=quickstart`, or the same under torchrun.

The configuration is checked before torch is imported. `--help`, `--cfg job` and `dry_run=true` never import it. The same command
resumes from the run's newest checkpoint. Exit codes: 0 done, 3 configuration, 4 data, 5 checkpoint, 6 a loss or gradient norm is not
finite, 7 stopped by SIGTERM, Ctrl-C or SIGHUP, either with a checkpoint or before there was anything to save, 8 a rank hung.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ssa_pretrain.libraries import hide_library_warnings, import_megatron_core
from ssa_pretrain.process import rank_process

if TYPE_CHECKING:
    from ssa_pretrain.monitor.metrics import Tracker


def main(more_trackers: Sequence[Callable[[Path], "Tracker"]] = ()) -> None:
    """Reads the command line and trains, with trackers beside W&B if a program passes some."""
    with rank_process("stopped before training began; the same command starts it again"):
        from ssa_pretrain.cli import read_config

        config = read_config("train")
        hide_library_warnings()
        import_megatron_core()
        from ssa_pretrain.trainer import train

        train(config, more_trackers)


if __name__ == "__main__":
    main()
