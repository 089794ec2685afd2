"""Renders a spec as a task file of SkyPilot, for `sky jobs launch`, which starts lost machines again.

The project's folder is copied to each machine and installed there by launchers/setup.sh. An image is not used: SkyPilot installs its own programs in it
as root, which the project's image does not allow. Folders that the run writes are volumes, because a bucket has no renaming, by which checkpoints are
published. Source: SkyPilot's reference of task files and of managed jobs.
"""

import shlex
from typing import Any

from ssa_pretrain.launch.render.shell import heading, node_words, supervised
from ssa_pretrain.launch.render.spec import BUCKET, LaunchSpec
from ssa_pretrain.launch.render.writer import dump

VENV = ".venv"
RESTART = 33  # exit code of the task that SkyPilot answers with a restart


def skypilot(spec: LaunchSpec, rendered: str) -> str:
    """Returns the task file."""
    sky = spec.skypilot
    resources: dict[str, Any] = {"accelerators": f"{sky.accelerator}:{spec.gpus_per_node}", "network_tier": "best"}
    if sky.infra:
        resources["infra"] = sky.infra
    if sky.use_spot:
        resources["use_spot"] = True
    resources["job_recovery"] = {"recover_on_exit_codes": [RESTART]}
    task: dict[str, Any] = {"name": spec.dns_name, "workdir": ".", "num_nodes": spec.nodes, "resources": resources}
    task["envs"] = spec.variables
    if spec.secrets:
        task["secrets"] = dict.fromkeys(spec.secrets)
    buckets = {m.folder: {"source": m.store, "mode": "MOUNT"} for m in spec.mounts.values() if BUCKET.match(m.store)}
    volumes = {m.folder: m.store for m in spec.mounts.values() if not BUCKET.match(m.store)}
    task |= {name: value for name, value in (("file_mounts", buckets), ("volumes", volumes)) if value}
    task["setup"] = f"TORCH_INDEX= launchers/setup.sh {VENV} {shlex.quote(sky.extras)}\n"
    head = 'head=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)\n' * (spec.nodes > 1)
    task["run"] = f'{head}{supervised(spec, skypilot_words(spec))}asks_for_restart && exit {RESTART}\nexit "$code"\n'
    secrets = "".join(f" --secret {name}" for name in spec.secrets)
    text = f"Start it in the project's folder with: sky jobs launch{secrets} FILE"
    return heading(text, rendered) + dump(task)


def skypilot_words(spec: LaunchSpec) -> list[str]:
    """Returns the quoted words of every machine, which runs in the project's folder."""
    words = node_words(spec, endpoint=f'"$head:{spec.port}"', folder="launchers")
    own = f"--python {shlex.quote(spec.python)}"
    return [f"--python {VENV}/bin/python" if word == own else word for word in words]
