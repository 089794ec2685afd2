"""The targets of a spec: how each is rendered, what it needs of the spec, and the command that each node runs."""

from collections.abc import Callable
from dataclasses import dataclass

from ssa_pretrain.launch.jobs import TRAIN
from ssa_pretrain.launch.render import kubernetes, machines, skypilot, slurm
from ssa_pretrain.launch.render.shell import wrapped
from ssa_pretrain.launch.render.spec import LaunchSpec
from ssa_pretrain.settings.problems import Problem


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of cluster.

    Attributes:
        render: returns the file, from the spec and the command that rendered it.
        command: returns the command of a node.
        needs_hosts: the nodes' names are in the spec, because no scheduler chooses them.
        has_container: the run is in the image if there is one; it must be there if `needs_image`.
        needs_image: the run is always in an image.
        engine: settings that the launcher adds.
    """

    render: Callable[[LaunchSpec, str], str]
    command: Callable[[LaunchSpec], str]
    needs_hosts: bool = False
    has_container: bool = True
    needs_image: bool = False
    engine: tuple[str, ...] = ()


TARGETS = {
    "torchrun": Target(machines.torchrun, machines.torchrun_command, needs_hosts=True, has_container=False),
    "deepspeed": Target(
        machines.deepspeed,
        machines.deepspeed_command,
        needs_hosts=True,
        has_container=False,
        engine=("engine=deepspeed",),
    ),
    "slurm": Target(slurm.slurm, lambda spec: wrapped(slurm.slurm_words(spec))),
    "docker": Target(machines.docker, machines.docker_command, needs_hosts=True, needs_image=True),
    "jobset": Target(kubernetes.jobset, lambda spec: wrapped(kubernetes.jobset_words(spec)), needs_image=True),
    "pytorchjob": Target(
        kubernetes.pytorchjob, lambda spec: wrapped(kubernetes.pytorchjob_words(spec)), needs_image=True
    ),
    "skypilot": Target(skypilot.skypilot, lambda spec: wrapped(skypilot.skypilot_words(spec)), has_container=False),
}


def target_problems(spec: LaunchSpec, name: str) -> list[Problem]:
    """Returns what a target needs and the spec does not give."""
    target, found = TARGETS[name], []
    if target.needs_hosts and spec.nodes > 1 and not spec.hosts:
        rule = f"must name the nodes, since target={name} has no scheduler that chooses them"
        found.append(Problem("hosts", spec.hosts, rule, "try 'hosts=[node0, node1]'"))
    if target.needs_image and not spec.image:
        found.append(Problem("image", "", f"is needed by target={name}", "build one from the Dockerfile"))
    if target.needs_image and spec.image.startswith("/"):
        rule = "is a file, which only Slurm's containers can use"
        found.append(Problem("image", spec.image, rule, "give the name of an image in a registry"))
    if name in ("jobset", "pytorchjob") and spec.secrets and not spec.kubernetes.secret:
        rule = "must name the Secret that has the variables of secrets"
        found.append(Problem("kubernetes.secret", "", rule, f"try kubernetes.secret={spec.dns_name}"))
    if name == "deepspeed" and spec.module != TRAIN:
        found.append(Problem("module", spec.module, f"must be {TRAIN} for target=deepspeed", "try target=torchrun"))
    if name == "deepspeed" and spec.recipe:
        found.append(Problem("recipe", spec.recipe, "has no target=deepspeed", "try target=torchrun"))
    if spec.recipe and spec.module != TRAIN:
        found.append(Problem("module", spec.module, f"must be {TRAIN} with recipe={spec.recipe}", "leave it out"))
    return found + _mount_problems(spec, name)


def _mount_problems(spec: LaunchSpec, name: str) -> list[Problem]:
    """Returns the problems of the folders: a target must have each, under the path that the run uses."""
    found = []
    in_container = TARGETS[name].needs_image or (TARGETS[name].has_container and bool(spec.image))
    for key, mount in ((f"mounts.{key}", mount) for key, mount in spec.mounts.items()):
        if name == "skypilot":
            if not mount.store:
                rule = "must name a volume, or a bucket that is only read, for target=skypilot"
                found.append(Problem(f"{key}.store", "", rule, f"try {key}.store=s3://data"))
        elif name in ("jobset", "pytorchjob"):
            if not (mount.claim or mount.path):
                found.append(Problem(f"{key}.claim", "", f"must name a claim for target={name}", f"or give {key}.path"))
        elif not mount.path:
            found.append(Problem(f"{key}.path", "", f"must name a folder of the nodes for target={name}", ""))
        elif not in_container and mount.folder != mount.path:
            rule = f"must equal {key}.path={mount.path}, since nothing is mounted without a container"
            found.append(Problem(f"{key}.target", mount.target, rule, "leave it out"))
    return found
