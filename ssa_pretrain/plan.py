"""Entry point: prints the plan of a run on a cluster as a table. Needs no GPU and starts no run.

    python -m ssa_pretrain.plan experiment=ssa_1b_8k hardware=h100 nodes=8
    python -m ssa_pretrain.plan experiment=ssa_1b_8k hardware=h100 nodes=8 --search     # ranks the layouts of these GPUs
    python -m ssa_pretrain.plan experiment=ssa_1b_8k hardware=h100 --scale              # 8 to 2,048 GPUs
    python -m ssa_pretrain.plan experiment=ssa_1b_8k --measured                         # the measured runs behind the estimates
    python -m ssa_pretrain.plan --check experiment=quickstart

The settings are those of a run, and `hardware`, `nodes` and `document_tokens` (config/hardware.py). With --check it prints nothing and exits 0 if
`ssa_pretrain.train` would accept the same arguments on this machine. Otherwise it prints the problems that `ssa_pretrain.train` would print and exits 3
or 4. Launchers run it once before they start many processes.
"""

import sys

from ssa_pretrain.process import command

CHECK = "--check"


def main() -> None:
    """Prints the plan of the command line's configuration, or checks it."""
    arguments = [argument for argument in sys.argv[1:] if argument != CHECK]
    with command("ssa_pretrain.plan"):
        from ssa_pretrain.cli import read_config

        read_config("train" if CHECK in sys.argv else "plan", arguments)


if __name__ == "__main__":
    main()
