"""Renders a spec for machines without a scheduler: a script for every node (torchrun, docker) or for the first one (deepspeed)."""

import shlex

from ssa_pretrain.launch.render.shell import entry_words, exports, heading, node_words, wrapped
from ssa_pretrain.launch.render.spec import LaunchSpec

START = "#!/usr/bin/env bash\n"


def torchrun(spec: LaunchSpec, rendered: str) -> str:
    """Returns the script that every node runs."""
    text = f"Run this on {_nodes(spec)}. To resume, run it again."
    return (
        f"{START}{heading(text, rendered)}set -euo pipefail\n\n{exports(spec.variables)}exec {torchrun_command(spec)}\n"
    )


def torchrun_command(spec: LaunchSpec) -> str:
    """Returns the command of every node."""
    return wrapped(node_words(spec, endpoint=endpoint(spec)))


def deepspeed(spec: LaunchSpec, rendered: str) -> str:
    """Returns the script that the first node runs; DeepSpeed's launcher starts the others by ssh.

    DeepSpeed passes only some variables on by itself. It reads all of the spec's from the file that DS_ENV_FILE names.
    """
    text = "Run this on the node. To resume, run it again."
    hosts = ""
    if spec.nodes > 1:
        text = f"Run this on {spec.hosts[0]}, which reaches the others by ssh. To resume, run it again."
        lines = "".join(f"{host} slots={spec.gpus_per_node}\n" for host in spec.hosts)
        variables = "".join(f"{name}={value}\n" for name, value in spec.variables.items())
        hosts = (
            f"files=$(mktemp -d)\nhostfile=$files/hosts\ncat >\"$hostfile\" <<'HOSTS'\n{lines}HOSTS\n"
            f"export DS_ENV_FILE=$files/environment\ncat >\"$DS_ENV_FILE\" <<'VARIABLES'\n{variables}VARIABLES\n"
        )
    command = f"exec {deepspeed_command(spec)}\n"
    return f"{START}{heading(text, rendered)}set -euo pipefail\n\n{exports(spec.variables)}{hosts}{command}"


def deepspeed_command(spec: LaunchSpec) -> str:
    """Returns the command of the first node."""
    words = [shlex.quote(f"{spec.directory}/launchers/deepspeed.sh")]
    several = ['--hostfile "$hostfile"', f"--master-port {spec.port}"]
    words += several if spec.nodes > 1 else [f"--num-gpus {spec.gpus_per_node}"]
    return wrapped(words + entry_words(spec))


def docker(spec: LaunchSpec, rendered: str) -> str:
    """Returns the script that every node runs: one container, with all of the node's GPUs and its network."""
    text = f"Run this on {_nodes(spec)}. To resume, run it again."
    secrets = f"Variables that must be set: {', '.join(spec.secrets)}." if spec.secrets else ""
    head = heading("\n".join([text, *[secrets] * bool(secrets)]), rendered)
    return f"{START}{head}set -euo pipefail\n\nexec {docker_command(spec)}\n"


def docker_command(spec: LaunchSpec) -> str:
    """Returns the command of every node."""
    words = [
        "docker run",
        "--rm",
        f"--name {spec.name}",
        f"--gpus {spec.gpus_per_node}",
        "--network host",
        "--ipc host",
    ]
    words += ["--ulimit memlock=-1", "--ulimit stack=67108864", '--user "$(id -u):$(id -g)"']
    words += [f"--stop-timeout {spec.stop_seconds + 30}"]
    words += [f"--env {shlex.quote(f'{name}={value}')}" for name, value in spec.variables.items()]
    words += [f"--env {name}" for name in spec.secrets]
    for mount in spec.mounts.values():
        words.append(f"--volume {shlex.quote(f'{mount.path}:{mount.folder}' + ':ro' * mount.read_only)}")
    program, *arguments = node_words(spec, endpoint=endpoint(spec))
    return wrapped([*words, f"--entrypoint {program}", shlex.quote(spec.image), *arguments])


def endpoint(spec: LaunchSpec) -> str:
    """Returns where the nodes meet."""
    return shlex.quote(f"{spec.hosts[0]}:{spec.port}") if spec.hosts else ""


def _nodes(spec: LaunchSpec) -> str:
    return "the node" if spec.nodes == 1 else f"each of the {spec.nodes} nodes; they meet at {spec.hosts[0]}"
