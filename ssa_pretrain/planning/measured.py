"""The measured runs that the cost model is fitted to and judged by: measured_runs.csv, beside this file.

One line per run:

    date, commit     when, and of which code
    hardware         a file of conf/hardware; gpus of one node
    work             pass: forward and backward; step: also the optimizer
    microbatches     per data rank and step
    settings         the settings that differ from the schema's defaults, as on the command line; model=NAME is a file of conf/model
    documents        a rule of documents.py
    ms               time of the work; empty: not measured
    peak_gib         peak of the memory that tensors hold, on the fullest rank; empty: not measured, or shared with another model
    weights_gib, gradients_gib, optimizer_gib, activations_gib
                     the parts of that peak; empty: not measured by part
    source           the page with the run, and its section

`python tests/benchmarks/measure_plan.py` appends runs in this form. Runs of code that has since become faster or smaller are left out.
"""

import csv
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from ssa_pretrain.config import CONF, Config
from ssa_pretrain.config.hardware import HardwareConfig
from ssa_pretrain.settings.convert import config_from_dict
from ssa_pretrain.settings.problems import ConfigError

PATH = Path(__file__).with_name("measured_runs.csv")
COLUMNS = (
    *("date", "commit", "hardware", "gpus", "work", "microbatches"),
    *(
        "settings",
        "documents",
        "ms",
        "peak_gib",
        "weights_gib",
        "gradients_gib",
        "optimizer_gib",
        "activations_gib",
        "source",
    ),
)
PARTS = ("weights", "gradients", "optimizer", "activations")


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRun:
    """One line of the file.

    Attributes:
        config: the run's configuration.
        hardware: the GPUs.
        world_size: their number.
        has_optimizer: whether a whole step was measured.
        documents: the rule of its documents.
        seconds: time of the work; None: not measured.
        peak_bytes: peak of the memory; None: not measured.
        part_bytes: its parts, by the names in PARTS; those that were not measured are left out.
        settings: as in the file.
        source: where the run is described.
    """

    config: Config
    hardware: HardwareConfig
    world_size: int
    has_optimizer: bool
    documents: str
    seconds: float | None
    peak_bytes: float | None
    part_bytes: dict[str, float]
    settings: str
    source: str

    @property
    def dp(self) -> int:
        """Data ranks."""
        parallel = self.config.parallel
        return self.world_size // (parallel.tp * parallel.pp * parallel.cp)


def measured_runs(path: Path = PATH) -> list[MeasuredRun]:
    """Returns the runs of a file.

    Raises:
        ValueError: a line has a setting that the schema does not know, or another column than these.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} must have the columns {','.join(COLUMNS)}; try the header of {PATH}")
        return [_run(line, f"{path}, line {reader.line_num}") for line in reader]


def _run(line: dict[str, str], place: str) -> MeasuredRun:
    """Returns the run of a line."""
    config = config_of(line["settings"], place)
    gpus, microbatches = int(line["gpus"]), int(line["microbatches"])
    parallel, training = config.parallel, config.training
    dp = gpus // (parallel.tp * parallel.pp * parallel.cp)
    tokens = microbatches * dp * training.micro_batch_size * config.data.sequence_length
    config = replace(config, training=replace(training, global_batch_tokens=tokens, steps=1))
    return MeasuredRun(
        config=config,
        hardware=hardware_of(line["hardware"]),
        world_size=gpus,
        has_optimizer=line["work"] == "step",
        documents=line["documents"],
        seconds=float(line["ms"]) / 1e3 if line["ms"] else None,
        peak_bytes=float(line["peak_gib"]) * 2**30 if line["peak_gib"] else None,
        part_bytes={part: float(text) * 2**30 for part in PARTS if (text := line[f"{part}_gib"])},
        settings=f"{line['hardware']} x {gpus}, {line['work']}, {line['settings']}, {line['documents']}",
        source=line["source"],
    )


def config_of(settings: str, place: str = "the settings") -> Config:
    """Returns the configuration of settings as on the command line, without groups other than the model.

    Args:
        settings: words such as "model=llama_1b attention.method=full".
        place: where they stand, for the error.
    """
    tree: dict[str, Any] = {}
    for word in settings.split():
        key, _, value = word.partition("=")
        if key == "model":
            tree["model"] = dict(_yaml("model", value))
            continue
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = {"true": True, "false": False}.get(value, value)  # numbers are converted with their fields
    config, problems = config_from_dict(Config, tree)
    problems = [problem for problem in problems if problem.key != "data.path"]
    if problems:
        raise ValueError(f"{place}: {ConfigError(problems)}")
    return config


@lru_cache(maxsize=16)
def hardware_of(name: str) -> HardwareConfig:
    """Returns a file of conf/hardware."""
    return HardwareConfig(**_yaml("hardware", name))


@lru_cache(maxsize=32)
def _yaml(group: str, name: str) -> dict[str, Any]:
    """Returns the content of a group's file."""
    return yaml.safe_load((CONF / group / f"{name}.yaml").read_text(encoding="utf-8"))
