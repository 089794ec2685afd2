"""The launch spec: what is run, on how many GPUs, from which image and folders. Every renderer reads it, so a run is described once.

A spec is a YAML file with the keys of `LaunchSpec`, checked like the settings of a run: every problem is found before anything is rendered. The run
itself is an experiment with overrides, which `check_run` plans for the spec's number of GPUs. The spec holds no secrets, only the names of the
variables that hold them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ssa_pretrain.config import Config
from ssa_pretrain.launch.jobs import TRAIN
from ssa_pretrain.settings.convert import MISSING, config_from_dict, unknown_key
from ssa_pretrain.settings.convert import known_keys as keys_of
from ssa_pretrain.settings.problems import SECRET, ConfigError, Problem, at_least, between
from ssa_pretrain.settings.typed import field_type, read_yaml

NAME = re.compile(r"[a-z]([a-z0-9_-]{0,38}[a-z0-9])?")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
TIME = re.compile(r"([0-9]+-)?[0-9]{1,2}:[0-5][0-9]:[0-5][0-9]")
OVERRIDE = re.compile(r"(\w+:)?[+~]{0,2}[\w.@/]+=.*", re.DOTALL)  # the prefix is that of a stage
BUCKET = re.compile(r"(s3|gs|r2|https)://.+")
# Settings of the run that the spec gives, with the key that gives them.
OF_THE_SPEC = {
    "experiment": "experiment",
    "output_dir": "output_dir",
    "parallel.world_size": "nodes and gpus_per_node",
}


@dataclass(kw_only=True, slots=True)
class Mount:
    """A folder that the run reads or writes, and where each kind of cluster has it."""

    target: str = ""  # absolute path that the run uses; empty: that of path
    path: str = (
        ""  # folder on every node, for torchrun, deepspeed, docker and slurm, and for Kubernetes without a claim
    )
    claim: str = ""  # PersistentVolumeClaim of Kubernetes, which every node can mount at once
    store: str = ""  # SkyPilot: the name of a volume, or the address of a bucket (s3://, gs://), which is read only
    read_only: bool = False  # the run cannot write there

    @property
    def folder(self) -> str:
        """The path that the run uses."""
        return self.target or self.path

    def problems(self, key: str) -> list[Problem]:
        """Returns the problems within this mount; `key` is its dotted key."""
        given = {"target": self.target, "path": self.path}
        rule, advice = "must be an absolute path", "begin it with /"
        found = [Problem(f"{key}.{n}", v, rule, advice) for n, v in given.items() if v and not v.startswith("/")]
        if ":" in self.folder or "," in self.folder:
            rule = "must not have : or , which separate the parts of a mount"
            found.append(Problem(f"{key}.target", self.folder, rule, "rename the folder"))
        if not self.folder:
            found.append(Problem(f"{key}.target", "", "must be an absolute path", f"try {key}.target=/data"))
        if BUCKET.fullmatch(self.store) and not self.read_only:
            rule = "is a bucket, where checkpoints cannot be published by renaming"
            advice = f"try {key}.read_only=true, or the name of a volume"
            found.append(Problem(f"{key}.store", self.store, rule, advice, (f"{key}.read_only",)))
        return found


@dataclass(kw_only=True, slots=True)
class SlurmSpec:
    """What only Slurm knows."""

    account: str = ""  # account that is charged; empty: the user's default
    qos: str = ""  # quality of service; empty: the partition's default
    options: list[str] = field(default_factory=list)  # more options of sbatch, such as --exclude=node7


@dataclass(kw_only=True, slots=True)
class KubernetesSpec:
    """What only Kubernetes knows."""

    namespace: str = "default"  # namespace of the job
    secret: str = ""  # Secret that has the variables of `secrets` as its keys; needed if there are any
    pull_secret: str = ""  # Secret for the image's registry; empty: none
    shared_memory_gib: int = 64  # size of /dev/shm, which NCCL and the data workers use, in GiB
    user: int = 10001  # user and group of the processes and of new files; the image's own
    resources: dict[str, str] = field(default_factory=dict)  # more resources of each pod, such as {rdma/ib: 8}


@dataclass(kw_only=True, slots=True)
class SkyPilotSpec:
    """What only SkyPilot knows."""

    accelerator: str = "H100"  # GPU under SkyPilot's name
    infra: str = ""  # where to look for machines, such as aws/us-east-1 or k8s; empty: everywhere
    use_spot: bool = False  # machines that can be taken away; the run resumes on others
    extras: str = "gpu,deepspeed"  # extras of the project that launchers/setup.sh installs


@dataclass(kw_only=True, slots=True)
class LaunchSpec:
    """A run on a cluster."""

    name: str = MISSING  # name of the job
    nodes: int = 1  # machines
    gpus_per_node: int = 8  # GPUs, and processes, on each machine
    hosts: list[str] = field(default_factory=list)  # names of the machines, the first of which the others can reach
    image: str = ""  # container image, or an .sqsh file for Slurm; empty: the machines' own Python
    directory: str = "/opt/ssa_pretrain"  # the project's folder in the image, or on every machine
    python: str = "python3"  # interpreter with the project installed
    module: str = TRAIN  # entry point of the processes
    experiment: str = ""  # the run's experiment
    recipe: str = ""  # in place of experiment: all stages of this recipe, by launchers/stages.sh
    output_dir: str = MISSING  # the folder of the run, or of all stages, on storage that all machines share
    overrides: list[str] = field(default_factory=list)  # further settings of the run, KEY=VALUE
    environment: dict[str, str] = field(default_factory=dict)  # variables of the processes
    secrets: list[str] = field(default_factory=list)  # names of variables that are passed on from outside the spec
    mounts: dict[str, Mount] = field(default_factory=dict)  # folders by name
    time_limit: str = ""  # [DAYS-]HH:MM:SS before the job goes back into the queue; empty: the cluster's
    queue: str = ""  # Slurm's partition, Kueue's local queue; empty: the cluster's default
    port: int = 29400  # port of the first machine at which the others meet it
    stop_seconds: int = 600  # seconds that a stopped run gets to write its checkpoint
    max_restarts: int = 20  # how often a scheduler starts the run again
    restart_after_minutes: int = 10  # a failure that comes sooner would come again, so it is final
    slurm: SlurmSpec = field(default_factory=SlurmSpec)
    kubernetes: KubernetesSpec = field(default_factory=KubernetesSpec)
    skypilot: SkyPilotSpec = field(default_factory=SkyPilotSpec)

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.nodes * self.gpus_per_node

    @property
    def dns_name(self) -> str:
        """The name as Kubernetes and SkyPilot accept it."""
        return self.name.replace("_", "-")

    @property
    def settings(self) -> list[str]:
        """The arguments of the entry point; one other than training, and the stages, take only the overrides."""
        if self.module != TRAIN or self.recipe:
            return self.overrides
        return [f"experiment={self.experiment}", f"output_dir={self.output_dir}", *self.overrides]

    @property
    def variables(self) -> dict[str, str]:
        """The variables of the launcher on every machine, without the secrets."""
        return {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(self.stop_seconds)} | self.environment

    def problems(self) -> list[Problem]:
        """Returns the problems that do not depend on the target."""
        found = at_least("", self, 1, "nodes", "gpus_per_node") + at_least("", self, 30, "stop_seconds")
        found += at_least("", self, 0, "max_restarts", "restart_after_minutes") + between("", self, 1024, 65535, "port")
        found += at_least("kubernetes", self.kubernetes, 1, "shared_memory_gib", "user")
        if not NAME.fullmatch(self.name):
            rule = (
                "must be at most 40 of a-z, 0-9, - and _, beginning with a letter and ending with a letter or a digit"
            )
            found.append(Problem("name", self.name, rule, "try ssa_1b_8k"))
        if self.module == TRAIN and bool(self.experiment) == bool(self.recipe):
            rule = "must be given, or recipe" if not self.recipe else f"must be empty with recipe={self.recipe}"
            found.append(Problem("experiment", self.experiment, rule, "try experiment=ssa_1b_8k"))
        for name in ("output_dir", "directory"):
            value = getattr(self, name)
            if value != MISSING and not value.startswith("/"):
                found.append(Problem(name, value, "must be an absolute path", f"try {name}=/{value}"))
        if self.hosts and len(set(self.hosts)) != self.nodes:
            rule = f"must be as many different names as nodes={self.nodes}"
            found.append(Problem("hosts", self.hosts, rule, "leave it empty if a scheduler chooses them", ("nodes",)))
        if self.time_limit and not TIME.fullmatch(self.time_limit):
            found.append(Problem("time_limit", self.time_limit, "must be [DAYS-]HH:MM:SS", "try 24:00:00"))
        found += [
            Problem("overrides", override, "must be KEY=VALUE", "try optim.lr=1e-3")
            for override in self.overrides
            if self.module == TRAIN and not OVERRIDE.fullmatch(override)
        ]
        found += [
            Problem("overrides", override, "sets what the spec gives", f"use {OF_THE_SPEC[key]}")
            for override in self.overrides
            if (key := _key(override)) in OF_THE_SPEC
        ]
        return (
            found + self._variable_problems() + [p for n, m in self.mounts.items() for p in m.problems(f"mounts.{n}")]
        )

    def _variable_problems(self) -> list[Problem]:
        """Returns the problems of the names of variables and mounts."""
        rule = "must be letters, digits and _"
        found = [
            Problem(key, name, rule, "try NCCL_DEBUG")
            for key, names in (("environment", self.environment), ("secrets", self.secrets))
            for name in names
            if not VARIABLE.fullmatch(name)
        ]
        found += [
            Problem(f"environment.{name}", "", "is a secret, and the spec is saved", f"try secrets=[{name}]")
            for name in self.environment
            if SECRET.search(name)
        ]
        rule = "must be a name of a-z, 0-9 and -, beginning with a letter"
        return found + [
            Problem(f"mounts.{name}", None, rule, "try mounts.data")
            for name in self.mounts
            if not re.fullmatch(r"[a-z]([a-z0-9-]{0,30}[a-z0-9])?", name)
        ]


def read_spec(path: str, changes: Sequence[str], overrides: Sequence[str]) -> LaunchSpec:
    """Returns the spec of a YAML file.

    Args:
        path: the file.
        changes: KEY=VALUE that replace its values, with dotted keys.
        overrides: further settings of the run; they replace the file's settings of the same keys.

    Raises:
        ConfigError: with all problems of the file and of the changes.
    """
    tree, problems = _read_tree(path)
    for change in changes:
        problems += _apply(tree, change)
    given = tree.get("overrides")
    if overrides and (given is None or isinstance(given, list)):
        replaced = {_key(override) for override in overrides}
        tree["overrides"] = [*(one for one in given or [] if _key(str(one)) not in replaced), *overrides]
    spec, found = config_from_dict(LaunchSpec, tree)
    problems += found
    wrong, found = {problem.key for problem in problems}, spec.problems()
    wrong_reads = wrong | {problem.key for problem in found if not problem.reads}
    problems += [one for one in found if one.key not in wrong and wrong_reads.isdisjoint(one.reads)]
    if problems:
        raise ConfigError(problems)
    return spec


def check_run(spec: LaunchSpec, engine: Sequence[str] = ()) -> Config | None:
    """Returns the configuration of the spec's run, checked for its number of processes; None if it is not one training run.

    Args:
        spec: the spec.
        engine: the setting that a launcher adds.

    Raises:
        ConfigError: the run would be refused.
    """
    from ssa_pretrain.cli import resolve_config
    from ssa_pretrain.config.machine import Machine

    if spec.recipe:
        from ssa_pretrain.launch.stages.command import check_words

        check_words([*stages_words(spec), *spec.overrides], spec.world_size)
    if spec.module != TRAIN or spec.recipe:
        return None
    arguments = [*engine, *spec.settings, f"parallel.world_size={spec.world_size}", "dry_run=true"]
    return resolve_config("train", arguments, Machine(world_size=spec.world_size, has_files=False))


def stages_words(spec: LaunchSpec) -> list[str]:
    """Returns the flags that only launchers/stages.sh has."""
    return [f"--recipe={spec.recipe}", f"--out={spec.output_dir}"]


def _key(override: str) -> str:
    """Returns the key of an override."""
    return override.lstrip("+").partition("=")[0]


def _read_tree(path: str) -> tuple[dict[str, Any], list[Problem]]:
    """Returns the content of a spec as plain values, and why it cannot be read."""
    advice = "copy launchers/spec.yaml and change it"
    try:
        tree = read_yaml(Path(path).read_text(encoding="utf-8"), LaunchSpec)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not text"
        raise ConfigError([Problem("spec", path, f"cannot be read: {reason}", advice)]) from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError([Problem("spec", path, f"is not YAML: {reason}", "correct that line")]) from None
    if not isinstance(tree, dict):
        raise ConfigError([Problem("spec", path, "does not hold keys and values", advice)])
    return tree, []


def _apply(tree: dict[str, Any], change: str) -> list[Problem]:
    """Sets a value of a spec from KEY=VALUE; returns the problems of the key and of the value."""
    key, equals, text = change.partition("=")
    known = keys_of(LaunchSpec)
    in_mapping = any(key.startswith(f"{mapping}.") for mapping in ("environment", "mounts", "kubernetes.resources"))
    if not equals or not (key in known or in_mapping):
        return [unknown_key(key, text if equals else None, known)]
    kind = field_type(LaunchSpec, key)
    try:
        value = text if kind is str else read_yaml(text, kind)
    except yaml.YAMLError:
        return [Problem(key, text, "is not a value in YAML", "quote it for the shell, as in 'hosts=[a, b]'")]
    *sections, name = key.split(".", 2) if key.startswith("mounts.") else key.split(".")
    for section in sections:
        inner = tree.setdefault(section, {})
        if not isinstance(inner, dict):
            return [Problem(section, None, "is a section, not a value", "see --help")]
        tree = inner
    tree[name] = value
    return []
