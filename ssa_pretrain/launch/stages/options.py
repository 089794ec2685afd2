"""The command line of `python -m ssa_pretrain.launch stages`: flags of torchrun's launcher, a recipe, a folder, and settings by stage.

A setting without a prefix holds for both training stages. A prefix limits it to one stage: `32k:optim.lr=5e-5`. Settings that the stages give
themselves are refused. Stdlib only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ssa_pretrain.config import CONF
from ssa_pretrain.errors import LaunchError
from ssa_pretrain.launch.jobs import TORCHRUN_FLAGS, read_flags

DATA, SHORT, LONG, EVALUATION, EXPORT = STAGES = ("data", "8k", "32k", "evaluation", "export")
WITH_SETTINGS = (SHORT, LONG, EVALUATION, EXPORT)
GIVEN = {
    "output_dir": "use --out, below which every stage has its folder",
    "out": "use --out, below which every stage has its folder",
    "experiment": "use --recipe, which names both experiments",
    "checkpoint.init_from": "leave it out: 32k starts from the weights of 8k",
    "parallel.world_size": "use --nnodes and --nproc-per-node",
}


@dataclass(slots=True)
class Options:
    """What the command line asks for.

    Attributes:
        recipe: both experiments without their length, such as ssa_1b.
        out: the folder of everything.
        flags: of launchers/torchrun.sh, by name.
        settings: KEY=VALUE by stage; those of both training stages are in both lists.
        dry_run: only print commands and plans.
        status: only print the state.
    """

    recipe: str = ""
    out: Path = Path()
    flags: dict[str, str] = field(default_factory=dict)
    settings: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in WITH_SETTINGS})
    dry_run: bool = False
    status: bool = False

    def launcher_flags(self, stage: str) -> list[str]:
        """Returns the flags of the launcher of a stage. Nodes that are late must not meet at the rendezvous of another stage."""
        flags = dict(self.flags)
        if int(flags.get("nnodes", "1")) > 1:
            flags["rdzv-id"] = f"{flags.get('rdzv-id', 'ssa_pretrain')}-{stage}"
        return [f"--{name}={value}" for name, value in flags.items()]


def recipes() -> list[str]:
    """Returns the names whose experiments exist at both lengths."""
    names = {path.stem for path in (CONF / "experiment").glob("*.yaml")}
    return sorted(n.removesuffix(f"_{SHORT}") for n in names if n.replace(f"_{SHORT}", f"_{LONG}") in names - {n})


def read_stages(words: Sequence[str]) -> Options:
    """Returns the options of a command line. Raises LaunchError."""
    names = tuple(name for name in TORCHRUN_FLAGS if name != "module")
    flags = read_flags([word for word in words if word != "--status"], (*names, "recipe", "out"))
    found = Options(dry_run=flags.dry_run, status="--status" in words)
    if "out" not in flags.values:
        raise LaunchError("--out must name the folder of all stages; try --out=outputs/ssa_1b")
    found.out = Path(flags.values.pop("out"))
    found.recipe = flags.values.pop("recipe", "")
    found.flags = {
        name: value for name, value in flags.values.items() if name != "python"
    }  # this process runs under it
    if found.recipe not in recipes() and not found.status:
        given = f"--recipe={found.recipe}" if found.recipe else "--recipe"
        raise LaunchError(f"{given} must be {', '.join(recipes()[:-1])} or {recipes()[-1]}")
    if not (nodes := found.flags.get("nnodes", "1")).isdecimal():
        raise LaunchError(f"--nnodes={nodes} must be a positive number; try 1")
    for word in flags.rest:
        _add(found, word)
    return found


def _add(found: Options, word: str) -> None:
    """Adds a setting to the stages that it holds for."""
    prefix, colon, setting = word.partition(":")
    stages: tuple[str, ...] = (prefix,)
    if not colon or "=" in prefix:
        stages, setting = (SHORT, LONG), word
    elif prefix not in WITH_SETTINGS:
        raise LaunchError(
            f"{word} is not a setting of a stage; begin it with {', '.join(f'{s}:' for s in WITH_SETTINGS)}"
        )
    key, equals, _ = setting.partition("=")
    key = key.lstrip("+~")
    if not equals and not setting.startswith("~"):
        raise LaunchError(f"{word} is not KEY=VALUE; flags of the launcher come before the settings")
    if key in GIVEN:
        raise LaunchError(f"{word} is given by the stages themselves; {GIVEN[key]}")
    for stage in stages:
        found.settings[stage].append(setting)
