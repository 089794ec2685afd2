"""Entry point: `python -m ssa_pretrain.train experiment=quickstart`, or the same under torchrun.

The configuration is checked before torch is imported. `--help`, `--cfg job` and `dry_run=true` never import it. The same command
resumes from the run's newest checkpoint. Exit codes: 0 done, 3 configuration, 4 data, 5 checkpoint, 6 a loss or gradient norm is not
finite, 7 stopped by SIGTERM, Ctrl-C or SIGHUP, either with a checkpoint or before there was anything to save.
"""

from ssa_pretrain.process import hide_library_warnings, rank_process


def main() -> None:
    """Reads the command line and trains."""
    with rank_process("stopped before training began; the same command starts it again"):
        from ssa_pretrain.cli import read_config

        config = read_config("train")
        hide_library_warnings()
        from ssa_pretrain.trainer import train

        train(config)


if __name__ == "__main__":
    main()
