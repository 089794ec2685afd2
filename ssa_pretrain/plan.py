"""The plan of a run as a table, without a GPU and without starting anything.

    python -m ssa_pretrain.plan experiment=ssa_1b_8k parallel.world_size=64
    python -m ssa_pretrain.plan --check experiment=quickstart

The second form says nothing and exits 0 if `ssa_pretrain.train` would accept the same arguments here, and otherwise prints
its list of problems and exits 3 or 4: a launcher asks once before it starts many processes.
"""

import sys

from ssa_pretrain.cli import read_config, report, this_machine
from ssa_pretrain.config import Config
from ssa_pretrain.data.indexed_format import load_manifest
from ssa_pretrain.planning import describe, make_plan
from ssa_pretrain.problems import ConfigError

CHECK = "--check"


def main() -> None:
    """Prints the plan of the command line's configuration, or checks it."""
    arguments = [argument for argument in sys.argv[1:] if argument != CHECK]
    if CHECK in sys.argv:
        read_config("train", arguments)
        return
    config = read_config("plan", arguments)
    world_size = config.parallel.world_size or this_machine().world_size or 1
    try:
        plan = make_plan(config, world_size, prepared_vocab_size(config))
    except ConfigError as error:
        sys.stderr.write(report("plan", error) + "\n")
        raise SystemExit(error.exit_code) from None
    sys.stdout.write(describe(config, plan, arguments) + "\n")


def prepared_vocab_size(config: Config) -> int | None:
    """Returns the vocabulary of the data, None where no data is prepared."""
    try:
        return load_manifest(config.data.path).tokenizer.vocab_size
    except ValueError:
        return None


if __name__ == "__main__":
    main()
