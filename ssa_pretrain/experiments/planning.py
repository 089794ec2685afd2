"""From the command line to jobs: which recipes, which runs with which settings, what is evaluated and measured. Starts nothing.

Recipes that share a setting share its runs. Every setting is resolved as `python -m ssa_pretrain.train` does it, so that a mistake is reported before anything
starts. A folder that holds a run with other settings is refused.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ssa_pretrain.cli import resolve_config
from ssa_pretrain.config import Config
from ssa_pretrain.config.machine import this_machine
from ssa_pretrain.errors import UsageError
from ssa_pretrain.experiments.jobs import BenchJob, EvaluationJob, Job, TrainJob
from ssa_pretrain.experiments.options import Options
from ssa_pretrain.experiments.recipe import Recipe, Setting
from ssa_pretrain.experiments.recipes import RECIPES
from ssa_pretrain.experiments.sizes import SIZES, Size
from ssa_pretrain.experiments.table_file import comparisons, recipe_of_file
from ssa_pretrain.saved_run import CONFIG
from ssa_pretrain.settings.convert import config_to_dict, load_config
from ssa_pretrain.settings.problems import ConfigError
from ssa_pretrain.settings.tree import flatten_settings

DECISIVE = ("model", "attention", "data", "optim", "precision", "training")  # sections that make runs different
FREE = ("data.path", "training.stop_at_step", "training.micro_batch_size")


@dataclass
class Experiment:
    """The recipes of a command with their jobs.

    Attributes:
        recipes: in the order of the command line.
        runs: every training run once, all settings with the first seed first.
        evaluations: of each run that has any.
        benches: every benchmark once.
    """

    recipes: list[Recipe]
    runs: list[TrainJob]
    evaluations: list[EvaluationJob]
    benches: list[BenchJob]

    @property
    def jobs(self) -> list[Job]:
        """All jobs in order of priority: benchmarks, then what finishes a run, then runs."""
        return [*self.benches, *self.evaluations, *self.runs]

    def runs_of(self, recipe: Recipe) -> list[TrainJob]:
        """Returns the runs of a recipe's settings, by setting and seed."""
        order = [setting.name for setting in recipe.settings]
        return sorted(
            (run for run in self.runs if run.setting in order), key=lambda run: (order.index(run.setting), run.seed)
        )


def plan(options: Options) -> Experiment:
    """Returns the jobs of a command.

    Raises:
        ConfigError: a setting is wrong.
        UsageError: a name is unknown, or a folder holds another run.
    """
    size = SIZES[options.size]
    recipes = [recipe_of(name, size) for name in options.names]
    known = list(dict.fromkeys(setting.name for recipe in recipes for setting in recipe.settings))
    if wrong := [name for name in options.only if name not in known]:
        raise UsageError(f"--only={','.join(wrong)} must be among {', '.join(known)}")
    if options.show:
        asked = comparisons(options.show, known)
        recipes = [replace(r, comparisons=[*r.comparisons, *_of(r, asked)]) for r in recipes]
    runs = _runs(options, size, recipes)
    evaluations = []
    for run in runs:
        wanted = {
            e.name: e
            for recipe in recipes
            if run.setting in {s.name for s in recipe.settings}
            for e in recipe.evaluations_of(run.setting)
        }
        if wanted:
            evaluations.append(
                EvaluationJob(f"{run.name}.evaluations", options.out, run=run, evaluations=list(wanted.values()))
            )
    benches = {
        bench.name: BenchJob(f"bench_{bench.name}", options.out, bench=bench)
        for recipe in recipes
        for bench in recipe.benches
    }
    return Experiment(recipes, runs, evaluations, list(benches.values()))


def recipe_of(name: str, size: Size) -> Recipe:
    """Returns a recipe by its name or its file."""
    return RECIPES[name](size) if name in RECIPES else recipe_of_file(Path(name))


def _of(recipe: Recipe, asked: Sequence[Any]) -> list[Any]:
    names = {setting.name for setting in recipe.settings}
    return [comparison for comparison in asked if {comparison.first, comparison.second} <= names]


def _runs(options: Options, size: Size, recipes: Sequence[Recipe]) -> list[TrainJob]:
    """Returns every run, all settings with the first seed first."""
    found: dict[str, tuple[Setting, Recipe]] = {}
    for recipe in recipes:
        for setting in recipe.settings:
            first = found.setdefault(setting.name, (setting, recipe))[0]
            if first.overrides != setting.overrides:
                raise UsageError(
                    f"{setting.name} must be the same setting in all recipes of a command; start them one by one, with another out="
                )
    chosen = {name: value for name, value in found.items() if not options.only or name in options.only}
    configs = {name: _resolved(options, size, *value) for name, value in chosen.items()}
    runs = []
    for seed in options.seeds:
        for name, (setting, recipe) in chosen.items():
            job = f"{name}_{seed}"
            config = replace(configs[name], seed=seed, name=job, output_dir=str(options.out / job))
            words = [
                *_overrides(options, size, setting, recipe),
                f"seed={seed}",
                f"name={job}",
                f"output_dir={options.out / job}",
            ]
            run = TrainJob(job, options.out, setting=name, seed=seed, overrides=words, config=config)
            _require_same(run, options.out)
            runs.append(run)
    return runs


def _overrides(options: Options, size: Size, setting: Setting, recipe: Recipe) -> list[str]:
    """Returns the overrides of a setting's runs, except those of a seed."""
    base = size.base if recipe.name in RECIPES else ()
    data = [f"data.path={size.default_data}"] if recipe.name in RECIPES else []
    online = ["logging.wandb.mode=online"] if os.environ.get("WANDB_API_KEY") else []
    return [*base, *setting.overrides, *data, *online, f"logging.wandb.group={recipe.name}", *options.overrides]


def _resolved(options: Options, size: Size, setting: Setting, recipe: Recipe) -> Config:
    """Returns the configuration of a setting. Raises ConfigError, whose keys have the setting's name before them."""
    planned = ["dry_run=true"] if options.dry_run or options.report else []
    machine = replace(this_machine(), world_size=1)
    try:
        config = resolve_config("train", [*_overrides(options, size, setting, recipe), *planned], machine)
    except ConfigError as error:
        raise ConfigError(
            [replace(problem, key=f"{setting.name}:{problem.key}") for problem in error.problems]
        ) from None
    return replace(config, dry_run=False)


def _require_same(run: TrainJob, out: Path) -> None:
    """Raises UsageError if a run's folder holds a run with other settings."""
    path = run.folder / CONFIG
    if not path.is_file():
        return
    there, here = (dict(flatten_settings(config_to_dict(config))) for config in (load_config(Config, path), run.config))
    for key, value in here.items():
        if key.partition(".")[0] in DECISIVE and key not in FREE and key in there and there[key] != value:
            raise UsageError(
                f"out={out} holds the run {run.name} with {key}={there[key]}, and this command has {value}; try another out="
            )
