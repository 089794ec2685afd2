"""The launch spec and its renderers: rendered examples, schemas of the manifests, scripts that shellcheck accepts, messages, and how a job ends."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from ssa_pretrain.launch.render.command import PROGRAM, answer
from ssa_pretrain.launch.render.kubernetes import seconds
from ssa_pretrain.launch.render.slurm import pyxis_image
from ssa_pretrain.launch.render.targets import TARGETS
from ssa_pretrain.settings.problems import ConfigError
from support.processes import ROOT

EXAMPLES = ("slurm.sbatch", "docker.sh", "kubernetes/jobset.yaml", "kubernetes/pytorchjob.yaml", "skypilot.yaml")
SCHEMAS = Path(__file__).parent / "schemas"
NAME = "name='a b $HOME'"
SPEC = "spec=launchers/spec.yaml"


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_is_what_its_own_head_renders(name: str) -> None:
    text = (ROOT / "launchers" / name).read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("# Rendered by: ")]
    command = line.removeprefix("# Rendered by: ")
    assert command.startswith(f"{PROGRAM} ")
    assert answer(shlex.split(command.removeprefix(PROGRAM))) == text


def manifest(target: str, *changes: str) -> dict[str, Any]:
    return yaml.safe_load(answer([f"target={target}", SPEC, *changes]))


@pytest.mark.parametrize("target", ["jobset", "pytorchjob"])
def test_manifest_has_the_schema_of_its_kind(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssa_pretrain.launch.render.command.check_run", lambda *_: None)
    schema = json.loads((SCHEMAS / f"{target}.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema).validate
    check(manifest(target))
    check(manifest(target, "nodes=1", "hosts=[]", "time_limit=", "queue=", "secrets=[]", "mounts.data.claim="))
    check(manifest(target, "kubernetes.pull_secret=registry", "kubernetes.resources={rdma/ib: 8}"))
    wrong = manifest(target)
    wrong["spec"]["replicas"] = 3
    with pytest.raises(jsonschema.ValidationError):
        check(wrong)


def scripts() -> dict[str, str]:
    """Returns the shell scripts of every target, those inside manifests included."""
    found = {}
    for target in TARGETS:
        for nodes in (1, 8):
            changes = [SPEC, "directory=/shared/ssa pretrain", *(["nodes=1", "hosts=[]"] if nodes == 1 else [])]
            text = answer([f"target={target}", *changes, "--", "layout=gpus_8_8k", NAME])
            if target == "jobset":
                jobs = yaml.safe_load(text)["spec"]["replicatedJobs"]
                text = jobs[0]["template"]["spec"]["template"]["spec"]["containers"][0]["command"][2]
            elif target == "pytorchjob":
                master = yaml.safe_load(text)["spec"]["pytorchReplicaSpecs"]["Master"]
                text = master["template"]["spec"]["containers"][0]["command"][2]
            elif target == "skypilot":
                text = yaml.safe_load(text)["run"]
            found[f"{target}_{nodes}"] = text
    return found


def test_every_script_passes_shellcheck_and_keeps_words_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that a scheduler sets, and a name in quotes, reach the launcher as they are. The run's settings are checked in other tests."""
    monkeypatch.setattr("ssa_pretrain.launch.render.command.check_run", lambda *_: None)
    for name, text in scripts().items():
        (tmp_path / name).write_text(text)
        assert shlex.quote(NAME) in text
    checker = Path(sys.executable).with_name("shellcheck")
    command = [checker, "--shell=bash", "--exclude=SC2148,SC2016", *sorted(tmp_path.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["target=slrum", SPEC], "did you mean slurm?"),
        (["target=slurm"], "spec must name a file; try spec=launchers/spec.yaml"),
        (["target=slurm", "spec=/nope"], "spec=/nope cannot be read: No such file or directory; copy launchers/spec"),
        (["target=slurm", SPEC, "nodess=3"], "nodess=3 is not a known key; did you mean nodes?"),
        (["target=slurm", SPEC, "hosts=[]", "nodes=0"], "nodes=0 must be at least 1; try 1"),
        (["target=slurm", SPEC, "nodes=3"], "must be as many different names as nodes=3; leave it empty if"),
        (["target=slurm", SPEC, "time_limit=5h"], "time_limit=5h must be [DAYS-]HH:MM:SS; try 24:00:00"),
        (["target=slurm", SPEC, "name=A b"], "name=A b must be at most 40 of a-z, 0-9, - and _"),
        (["target=slurm", SPEC, "output_dir=runs"], "output_dir=runs must be an absolute path; try output_dir=/runs"),
        (
            ["target=slurm", SPEC, "environment.HF_TOKEN=abc"],
            "is a secret, and the spec is saved; try secrets=[HF_TOKEN]",
        ),
        (["target=slurm", SPEC, "environment.A-B=1"], "environment=A-B must be letters, digits and _; try NCCL_DEBUG"),
        (["target=slurm", SPEC, "mounts.Runs.path=/a"], "mounts.Runs must be a name of a-z, 0-9 and -"),
        (["target=slurm", SPEC, "mounts.runs.store=s3://a"], "is a bucket, where checkpoints cannot be published"),
        (["target=slurm", SPEC, "mounts.runs.path=/a:b"], "must not have : or ,"),
        (
            ["target=slurm", SPEC, "--", "output_dir=/a"],
            "overrides=output_dir=/a sets what the spec gives; use output_dir",
        ),
        (["target=slurm", SPEC, "--", "fast"], "overrides=fast must be KEY=VALUE; try optim.lr=1e-3"),
        (["target=slurm", SPEC, "--", "optim.lrr=1"], "did you mean optim.lr?"),
        (["target=slurm", SPEC, "--", "layout=gpus_512_8k", "parallel.cp=7"], "parallel.cp=7"),
        (["target=docker", SPEC, "hosts=[]"], "must name the nodes, since target=docker has no scheduler"),
        (["target=jobset", SPEC, "image="], "image='' is needed by target=jobset; build one from the Dockerfile"),
        (["target=jobset", SPEC, "image=/a.sqsh"], "is a file, which only Slurm's containers can use"),
        (["target=jobset", SPEC, "kubernetes.secret="], "must name the Secret that has the variables of secrets"),
        (["target=skypilot", SPEC, "mounts.runs.store="], "must name a volume, or a bucket that is only read"),
        (["target=slurm", SPEC, "image=", "mounts.data.target=/data"], "since nothing is mounted without a container"),
        (["target=docker", SPEC, "mounts.data.path=", "mounts.data.target=/data"], "must name a folder of the nodes"),
        (["target=deepspeed", SPEC, "module=who"], "module=who must be ssa_pretrain.train for target=deepspeed"),
        (["target=slurm", SPEC, "fast"], "fast is not KEY=VALUE; see --help"),
        (["target=slurm", SPEC, "experiment="], "experiment='' must be given, or recipe; try experiment=ssa_1b_8k"),
        (["target=slurm", SPEC, "recipe=ssa_1b"], "experiment=ssa_1b_8k must be empty with recipe=ssa_1b"),
        (["target=deepspeed", SPEC, "experiment=", "recipe=ssa_1b"], "recipe=ssa_1b has no target=deepspeed"),
        (["target=slurm", SPEC, "experiment=", "recipe=ssa_9b"], "--recipe=ssa_9b must be "),
    ],
)
def test_messages(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        answer(words)
    assert message in str(refused.value) and refused.value.exit_code == 3


def test_dry_run_prints_the_command_of_every_node_the_variables_and_the_plan() -> None:
    text = answer(["target=torchrun", SPEC, "directory=/p", "--dry-run"])
    script, rest = text.split("\n\nnode0: ")
    assert script.startswith("#!/usr/bin/env bash\n")
    lines = rest.splitlines()
    assert lines[0] == lines[7].removeprefix("node7: ") and lines[0].startswith("/p/launchers/torchrun.sh --nnodes 8 ")
    assert lines[8:11] == [
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600",
        "NCCL_DEBUG=WARN",
        "WANDB_API_KEY: passed on, not in the spec",
    ]
    assert "layout     64 processes = tp 1 x pp 1 x cp 1 x dp 64" in lines and "HOST" not in rest


def test_later_overrides_replace_those_of_the_spec() -> None:
    text = answer(["target=slurm", SPEC, "--", "layout=gpus_8_8k", "seed=3"])
    command = text.partition("srun")[2]
    assert "gpus_64_8k" not in command and command.count("layout=") == 1 and "seed=3" in command


def test_recipe_runs_all_stages_on_every_node() -> None:
    changes = ["experiment=", "recipe=ssa_1b", "overrides=[data.path=/shared/data, '8k:layout=gpus_64_8k']"]
    text = answer(["target=slurm", SPEC, *changes, "--", "32k:layout=gpus_64_32k"])
    command = " ".join(text.partition("srun")[2].replace("\\\n", " ").split())
    assert "/opt/ssa_pretrain/launchers/stages.sh --nnodes 8 --nproc-per-node 8 --rdzv-endpoint" in command
    assert "--recipe=ssa_1b --out=/shared/runs/ssa_1b_8k data.path=/shared/data 8k:layout=gpus_64_8k" in command
    assert "32k:layout=gpus_64_32k &" in command and "experiment=" not in command


def test_units_and_names() -> None:
    assert [seconds(limit) for limit in ("0:30:00", "24:00:00", "2-01:00:05")] == [1800, 86400, 176405]
    images = {
        "nvcr.io/nvidia/pytorch:1": "nvcr.io#nvidia/pytorch:1",
        "lab/ssa:gpu": "lab/ssa:gpu",
        "/a.sqsh": "/a.sqsh",
    }
    images |= {"localhost/a": "localhost#a", "host:5000/a:1": "host:5000#a:1", "ubuntu": "ubuntu"}
    assert {image: pyxis_image(image) for image in images} == images
