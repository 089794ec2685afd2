"""The command line of `python -m ssa_pretrain.experiments`: names of recipes, own keys and flags, and settings of training that go to every run."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ssa_pretrain.errors import UsageError
from ssa_pretrain.experiments.recipes import RECIPES
from ssa_pretrain.experiments.sizes import SIZES

ALL = "all"
GIVEN = {
    "seed": "use seeds=1,2,3",
    "name": "each run has its setting's name and its seed",
    "output_dir": "use out=FOLDER, below which every run has its folder",
    "dry_run": "use --dry-run",
    "training.stop_at_step": "use --minutes",
}
EPILOG = f"""\
recipes: {", ".join(RECIPES)}; {ALL}; or a file of settings (tests/benchmarks/tables/)
keys:    size={"|".join(SIZES)}   seeds=1,2,3   out=outputs/experiments/SIZE
Other key=value settings go to every training run: data.path=data/mine training.steps=384
Guide:   docs/experiments.md
"""


@dataclass(slots=True)
class Options:
    """What the command line asks for.

    Attributes:
        names: of recipes, or paths of tables.
        size: a name of SIZES.
        seeds: of every setting.
        out: the folder of everything.
        overrides: for every training run.
        minutes: limit; 0: none.
        gpus: indices with commas; empty: all.
        per_gpu: most jobs at once on one device; 0: the usual number.
        only: settings to train; empty: all.
        show: differences to print, as A-B.
        csv: file for all held-out evaluations; empty: none.
        hardware: GPUs to plan for with dry_run, a file of conf/hardware/; empty: those of this machine.
        dry_run: print the jobs and end.
        report: write the reports and end.
    """

    names: list[str] = field(default_factory=list)
    size: str = "75m"
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    out: Path = Path()
    overrides: list[str] = field(default_factory=list)
    minutes: float = 0.0
    gpus: str = ""
    per_gpu: int = 0
    only: list[str] = field(default_factory=list)
    show: list[str] = field(default_factory=list)
    csv: str = ""
    hardware: str = ""
    dry_run: bool = False
    report: bool = False


def read_options(words: Sequence[str]) -> Options:
    """Returns the options of a command line. Raises UsageError; argparse prints --help and exits."""
    try:
        parsed, rest = _parser().parse_known_intermixed_args(list(words))
    except argparse.ArgumentError as error:
        raise UsageError(f"the command line cannot be read: {error}; see --help") from None
    if unknown := [word for word in rest if word.startswith("-") and word != "--"]:
        raise UsageError(f"{unknown[0]} is not a flag; see --help")
    words = [word for word in [*parsed.words, *rest] if word != "--"]
    keys: dict[str, str] = {}
    found = Options(minutes=parsed.minutes, gpus=parsed.gpus, per_gpu=parsed.per_gpu, csv=parsed.csv)
    found.dry_run, found.report, found.hardware = parsed.dry_run, parsed.report, parsed.hardware
    found.show = [pair for pair in parsed.show.split(",") if pair]
    found.only = [name for name in parsed.only.split(",") if name]
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            found.names.append(word)
        elif key in ("size", "seeds", "out"):
            keys[key] = value
        elif key in GIVEN:
            raise UsageError(f"{word} cannot be set for every run: {GIVEN[key]}")
        else:
            found.overrides.append(word)
    _apply(found, keys)
    return found


def _apply(found: Options, keys: dict[str, str]) -> None:
    """Checks names, size, seeds and numbers. Raises UsageError."""
    found.size = keys.get("size", found.size)
    if found.size not in SIZES:
        raise UsageError(f"size={found.size} must be {' or '.join(SIZES)}")
    if "seeds" in keys:
        try:
            found.seeds = [int(seed) for seed in keys["seeds"].split(",")]
        except ValueError:
            raise UsageError(f"seeds={keys['seeds']} must be whole numbers with commas; try seeds=1,2,3") from None
        if len(set(found.seeds)) < len(found.seeds) or min(found.seeds) < 0:
            raise UsageError(f"seeds={keys['seeds']} must be different numbers from 0 on; try seeds=1,2,3")
    if not found.names:
        raise UsageError(f"no recipe is named; try one of {', '.join(RECIPES)}, or {ALL}")
    found.names = list(RECIPES) if found.names == [ALL] else list(dict.fromkeys(found.names))
    if wrong := [name for name in found.names if name not in RECIPES and not Path(name).is_file()]:
        raise UsageError(f"{wrong[0]} is neither a recipe nor a file of settings; try one of {', '.join(RECIPES)}")
    if found.hardware and not found.dry_run:
        raise UsageError(f"--hardware={found.hardware} is for --dry-run only; leave it out")
    if found.minutes < 0 or found.per_gpu < 0:
        raise UsageError(
            "--minutes and --per-gpu must not be negative; leave them out for no limit and the usual number"
        )
    found.out = Path(keys.get("out", f"outputs/experiments/{found.size}"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ssa_pretrain.experiments",
        usage="python -m ssa_pretrain.experiments NAME ... [key=value ...] [flags]",
        description="The paper's experiments: trains, evaluates, measures, and writes reports; the same command continues.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
    )
    parser.add_argument("words", nargs="*", metavar="NAME, key=value", help="recipes and settings")
    parser.add_argument(
        "--minutes",
        type=float,
        default=0.0,
        help="start nothing that would not end in time; stop what still runs, which saves",
    )
    parser.add_argument("--gpus", default="", help="indices of GPUs, such as 0,1; default: all")
    parser.add_argument(
        "--per-gpu", type=int, default=0, help="most jobs at once on each device; default: 4 on a GPU, 1 on the CPU"
    )
    parser.add_argument("--only", default="", help="train only these settings, such as ssa,moba")
    parser.add_argument(
        "--show", default="", metavar="A-B,C-D", help="also the differences of these settings, paired by seed"
    )
    parser.add_argument("--csv", default="", help="write all held-out evaluations to this file")
    parser.add_argument(
        "--hardware", default="", help="with --dry-run: plan for these GPUs, such as h200; --gpus gives how many: 0,1"
    )
    parser.add_argument("--dry-run", action="store_true", help="print jobs, memory and device time")
    parser.add_argument("--report", action="store_true", help="only write the reports, from the results so far")
    return parser
