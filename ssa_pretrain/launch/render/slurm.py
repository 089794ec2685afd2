"""Renders a spec as a batch script of Slurm: one srun task per node starts torchrun, and the first node is where they meet.

Slurm signals the script before the time limit (--signal=B:USR1). The run then writes a checkpoint and the script puts the job back into the queue. It
does the same after a failure that may be cured by other nodes. After a node has failed or the job was preempted, Slurm does it (--requeue).
One task's failure does not end the others (--kill-on-bad-exit=0): they end by themselves when they miss its ranks, and the highest exit code, which
srun returns, is then that of a run and not that of a signal. Containers are started by pyxis and enroot. Source: the manuals of sbatch, srun and
scontrol, and pyxis' README. It does not ask Slurm anything.
"""

import re
import shlex

from ssa_pretrain.launch.render.shell import exports, heading, node_words, supervised
from ssa_pretrain.launch.render.spec import LaunchSpec

# To the tasks of all steps, not to srun: srun would end the step, and Slurm would kill its tasks KillWait (30) seconds later, while they save.
STOP = 'scancel --signal=TERM "$SLURM_JOB_ID"'
MARGIN_SECONDS = 60  # between the last moment to save and the time limit


def slurm(spec: LaunchSpec, rendered: str) -> str:
    """Returns the batch script."""
    text = f"Submit it with: sbatch {spec.name}.sbatch. The nodes meet at the first of them."
    if spec.secrets:
        text += f"\nsbatch passes {', '.join(spec.secrets)} on from the environment in which it is called."
    options = "".join(f"#SBATCH {option}\n" for option in _options(spec))
    words = ["srun --kill-on-bad-exit=0", *container_words(spec), *slurm_words(spec)]
    head = 'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)\n' * (spec.nodes > 1)
    return f"""\
#!/usr/bin/env bash
{heading(text, rendered)}{options}set -uo pipefail

{exports(spec.variables)}{head}restarts=${{SLURM_RESTART_COUNT:-0}}

{supervised(spec, words, stop_signal="USR1", stop=STOP)}
if asks_for_restart && ((restarts < {spec.max_restarts})); then
    echo "{spec.name}: exit code $code; back into the queue, restart $((restarts + 1)) of {spec.max_restarts}"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
exit "$code"
"""


def slurm_words(spec: LaunchSpec) -> list[str]:
    """Returns the quoted words that each task of srun runs."""
    return node_words(spec, endpoint=f'"$head:{spec.port}"', rdzv_id='"$SLURM_JOB_ID-$restarts"')


def container_words(spec: LaunchSpec) -> list[str]:
    """Returns the options of pyxis; none without an image."""
    if not spec.image:
        return []
    mounts = [f"{m.path}:{m.folder}{':ro' * m.read_only}" for m in spec.mounts.values()]
    words = [f"--container-image {shlex.quote(pyxis_image(spec.image))}", "--no-container-mount-home"]
    return words + [f"--container-mounts {shlex.quote(','.join(mounts))}"] * bool(mounts)


def pyxis_image(image: str) -> str:
    """Returns an image as pyxis names it: # after the registry, where Docker has /."""
    registry, slash, rest = image.partition("/")
    has_registry = bool(registry and slash) and bool(re.search(r"[.:]|^localhost$", registry))
    return f"{registry}#{rest}" if has_registry else image


def _options(spec: LaunchSpec) -> list[str]:
    """Returns the options of sbatch."""
    given = {
        "partition": spec.queue,
        "account": spec.slurm.account,
        "qos": spec.slurm.qos,
        "time": spec.time_limit,
    }
    options = [f"--job-name={spec.name}", f"--nodes={spec.nodes}", "--ntasks-per-node=1"]
    options += [f"--gpus-per-node={spec.gpus_per_node}", "--exclusive"]
    options += [f"--{name}={value}" for name, value in given.items() if value]
    options += [f"--output={spec.name}-%j.log", "--open-mode=append", "--requeue"]
    return [*options, f"--signal=B:USR1@{spec.stop_seconds + MARGIN_SECONDS}", *spec.slurm.options]
