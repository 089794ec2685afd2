"""Renders a spec for Kubernetes: a JobSet, or a PyTorchJob of Kubeflow's training operator. One pod per node runs torchrun.

The pod's script turns an end that asks for a restart into exit code 138. JobSet (jobset.x-k8s.io/v1alpha2): an indexed Job with stable host names; 138 or
a killed pod restarts all pods, any other code fails the JobSet. PyTorchJob (kubeflow.org/v1): its policy ExitCode restarts a pod on 138 and gives up on
codes below 128. Its only time limit ends the job for good, so `time_limit` is not rendered there. Kueue's label names the queue.
Source: the API references of JobSet, Kubernetes' Job and the training operator.
"""

from typing import Any

from ssa_pretrain.launch.render.shell import heading, node_words, supervised
from ssa_pretrain.launch.render.spec import LaunchSpec, Mount
from ssa_pretrain.launch.render.writer import dump

RETRYABLE = 138  # the exit code that the training operator leaves to users for "start this again"
KILLED = (137, 143)  # a pod that was killed, by too little memory or with its machine
JOB = "node"  # name of the JobSet's only job
CONTAINER = "pytorch"  # the name that the training operator looks for


def jobset(spec: LaunchSpec, rendered: str) -> str:
    """Returns the manifest of a JobSet."""
    final = {"containerName": CONTAINER, "operator": "NotIn", "values": [*KILLED, RETRYABLE]}
    job: dict[str, Any] = {
        "parallelism": spec.nodes,
        "completions": spec.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": final}]},
    }
    if spec.time_limit:
        job["activeDeadlineSeconds"] = seconds(spec.time_limit)
    pod = _pod(spec, jobset_words(spec))
    job["template"] = {"metadata": _labels(spec), "spec": {"restartPolicy": "Never", **pod}}
    manifest = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(spec),
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": spec.dns_name},
            "failurePolicy": {
                "maxRestarts": spec.max_restarts,
                "rules": [{"name": "final", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": JOB, "replicas": 1, "template": {"spec": job}}],
        },
    }
    return heading("Start it with: kubectl create -f FILE. It needs the JobSet controller.", rendered) + dump(manifest)


def jobset_words(spec: LaunchSpec) -> list[str]:
    """Returns the quoted words of every pod. The first pod's name does not change with restarts."""
    first = f"{spec.dns_name}-{JOB}-0-0.{spec.dns_name}"
    return node_words(spec, endpoint=f"{first}:{spec.port}")


def pytorchjob(spec: LaunchSpec, rendered: str) -> str:
    """Returns the manifest of a PyTorchJob."""
    template = {"metadata": _labels(spec), "spec": _pod(spec, pytorchjob_words(spec))}
    replicas = {"Master": 1, "Worker": spec.nodes - 1}
    manifest = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": _metadata(spec),
        "spec": {
            "nprocPerNode": str(spec.gpus_per_node),
            "runPolicy": {"cleanPodPolicy": "Running", "backoffLimit": spec.max_restarts},
            "pytorchReplicaSpecs": {
                role: {"replicas": count, "restartPolicy": "ExitCode", "template": template}
                for role, count in replicas.items()
                if count
            },
        },
    }
    text = "Start it with: kubectl create -f FILE. It needs Kubeflow's training operator."
    return heading(text, rendered) + dump(manifest)


def pytorchjob_words(spec: LaunchSpec) -> list[str]:
    """Returns the quoted words of every pod; the operator sets MASTER_ADDR to the first pod's name."""
    return node_words(spec, endpoint=f'"$MASTER_ADDR:{spec.port}"')


def seconds(time_limit: str) -> int:
    """Returns the seconds of [DAYS-]HH:MM:SS."""
    days, _, clock = time_limit.rpartition("-")
    hours, minutes, rest = map(int, clock.split(":"))
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + rest


def _pod(spec: LaunchSpec, words: list[str]) -> dict[str, Any]:
    """Returns the specification of a pod that runs quoted words. SIGTERM means that the pod moves, so it asks for a restart."""
    script = supervised(spec, words, stop_signal="TERM")
    script += f'asks_for_restart && exit {RETRYABLE}\nexit "$code"\n'
    environment: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in spec.variables.items()]
    environment += [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": spec.kubernetes.secret, "key": name}}}
        for name in spec.secrets
    ]
    mounts = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    mounts += [
        {"name": name, "mountPath": mount.folder} | ({"readOnly": True} if mount.read_only else {})
        for name, mount in spec.mounts.items()
    ]
    memory = {"medium": "Memory", "sizeLimit": f"{spec.kubernetes.shared_memory_gib}Gi"}
    user = spec.kubernetes.user
    pod: dict[str, Any] = {
        "terminationGracePeriodSeconds": spec.stop_seconds + 30,
        "securityContext": {"runAsNonRoot": True, "runAsUser": user, "runAsGroup": user, "fsGroup": user},
        "containers": [
            {
                "name": CONTAINER,
                "image": spec.image,
                "command": ["bash", "-c", script],
                "env": environment,
                "resources": {"limits": {"nvidia.com/gpu": str(spec.gpus_per_node), **spec.kubernetes.resources}},
                "securityContext": {"allowPrivilegeEscalation": False},
                "volumeMounts": mounts,
            }
        ],
        "volumes": [{"name": "shared-memory", "emptyDir": memory}, *(_volume(*item) for item in spec.mounts.items())],
    }
    if spec.kubernetes.pull_secret:
        pod["imagePullSecrets"] = [{"name": spec.kubernetes.pull_secret}]
    return pod


def _volume(name: str, mount: Mount) -> dict[str, Any]:
    """Returns the volume of a mount: a claim if it has one, else a folder of every node."""
    if mount.claim:
        source = {"claimName": mount.claim} | ({"readOnly": True} if mount.read_only else {})
        return {"name": name, "persistentVolumeClaim": source}
    return {"name": name, "hostPath": {"path": mount.path, "type": "Directory"}}


def _metadata(spec: LaunchSpec) -> dict[str, Any]:
    """Returns the metadata of the job."""
    queue = {"labels": {"kueue.x-k8s.io/queue-name": spec.queue}} if spec.queue else {}
    return {"name": spec.dns_name, "namespace": spec.kubernetes.namespace, **queue}


def _labels(spec: LaunchSpec) -> dict[str, Any]:
    return {"labels": {"app.kubernetes.io/name": spec.dns_name}}
