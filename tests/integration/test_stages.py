"""The stages command at toy size on a CPU: data check, 8k, 32k, evaluation at 4 times the length, export; killed in each stage and run again.

The experiments are the real ones with a tiny model and short rows. Each stage's process is killed with SIGKILL at a chosen call, and with it, in every
other stage, the command itself. The stages' processes are forked, without their launcher: tests/unit/launch tests that, and how stages are supervised.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from ssa_pretrain.launch.jobs import torchrun_job
from ssa_pretrain.launch.stages import command
from ssa_pretrain.launch.stages.options import read_stages
from ssa_pretrain.launch.stages.state import State, table
from support.processes import SUPPORT, run_ranks
from support.training import records

pytestmark = pytest.mark.timeout(1500)  # the first test waits for all stages
SETTINGS = [
    "model=tiny",
    "precision=fp32",
    "attention.impl=reference",
    "attention.top_k=2",
    "training.micro_batch_size=1",
    "evaluation.rows=4",
    "evaluation.head_rows=0",
    "checkpoint.interval=1",
    "optim.lr=1e-3",
]
SETTINGS += ["8k:data.sequence_length=64", "8k:training.global_batch_tokens=128", "8k:training.total_tokens=512"]
SETTINGS += ["32k:data.sequence_length=256", "32k:training.global_batch_tokens=512", "32k:training.total_tokens=1536"]
SETTINGS += ["export:dtype=fp32"]
# Where each stage is killed: a function and its call. While it commits a later checkpoint; between the modes; when the weights are written.
KILLED = {
    "data": ("ssa_pretrain.settings.files:file_sha256", 2),
    "8k": ("ssa_pretrain.checkpoint.publish:_Save.commit", 3),
    "32k": ("ssa_pretrain.checkpoint.publish:_Save.commit", 2),
    "evaluation": ("ssa_pretrain.evaluation.held_out:evaluate_mode", 2),
    "export": ("ssa_pretrain.huggingface.exporting:write_index", 1),
}
AND_THE_COMMAND = (
    "data",
    "32k",
    "export",
)  # stages in which the command is killed as well, so its state stays at "running"


class Killed(BaseException):
    """Ends the command where it waits for a stage, as SIGKILL does: it writes nothing more."""


class Stages:
    """The command on one folder.

    Attributes:
        words: its command line.
        kills: stages that will be killed.
        started: names of the stages that were started, in order.
    """

    def __init__(self, out: Path, *settings: str) -> None:
        self.words = ["--recipe=ssa_300m", f"--out={out}", "--nproc-per-node=1", *SETTINGS, *settings]
        self.out = out
        self.kills = set(KILLED)
        self.started: list[str] = []
        self.configs = command.check(read_stages(self.words), 1)  # once: no test changes settings that it reads

    def run(self) -> int:
        """Runs the command once, and returns its exit code; None if it was killed."""
        try:
            return command.run(read_stages(self.words), self.configs, self.execute)
        except Killed:
            return -9

    def execute(self, words: list[str]) -> int:
        """Runs the process of a stage, and kills it if that is its turn."""
        state = json.loads((self.out / "stages.json").read_text())["stages"]
        (stage,) = [name for name, record in state.items() if record["status"] == "running"]
        self.started.append(stage)
        module, arguments = words[2], words[3:]
        if module == "ssa_pretrain.launch":
            job, _ = torchrun_job(arguments[1:], {})
            module, arguments = job.module, job.arguments
        called = ["-m", module, *arguments]
        if stage in self.kills:
            place, count = KILLED[stage]
            called = [str(SUPPORT / "killed_in.py"), place, str(count), *called[1:]]
        (ended,) = run_ranks(called, [{}], timeout=600)
        if stage in self.kills:
            self.kills.remove(stage)
            assert ended.code == -9, ended.stdout + ended.stderr
            if stage in AND_THE_COMMAND:
                raise Killed
            return 1  # what the supervisor makes of it
        assert ended.code == 0, ended.stdout + ended.stderr
        return ended.code


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Iterator[tuple[Stages, list[dict[str, Any]]]]:
    """Yields the command after all stages were killed once and done, and the state after each of its runs."""
    found = Stages(tmp_path_factory.mktemp("stages") / "all", f"data.path={corpus}")
    states = []
    for code in (-9, 1, -9, 1, -9, 0):
        assert found.run() == code
        states.append(json.loads((found.out / "stages.json").read_text())["stages"])
    yield found, states
    shutil.rmtree(found.out)


def test_killed_in_each_stage_the_command_continues_where_it_was(stages: tuple[Stages, list[dict[str, Any]]]) -> None:
    found, states = stages
    names = list(KILLED)
    assert found.started == [name for name in names for _ in range(2)]  # the killed stage again, and no earlier one
    for number, name in enumerate(names):
        status = {other: states[number][other]["status"] for other in names}
        killed = "running" if name in AND_THE_COMMAND else "failed"
        expected = ["done"] * number + [killed] + ["waiting"] * (len(names) - number - 1)
        assert list(status.values()) == expected
    assert {states[-1][name]["status"] for name in names} == {"done"}
    assert "8k          done" in table(State(found.out)) and "checkpoint of step 4 of 4" in table(State(found.out))


def test_each_stage_continues_its_own_work(stages: tuple[Stages, list[dict[str, Any]]]) -> None:
    """A run goes on after its newest checkpoint, and its records are those of one that was never killed."""
    out = stages[0].out
    for name, steps in (("8k", 4), ("32k", 3)):
        assert [record["step"] for record in records(out / name, "train")] == list(range(1, steps + 1))
    evaluation = json.loads((out / "32k" / "evaluations" / "at_4x.json").read_text())
    assert evaluation["settings"]["data.sequence_length"] == 1024 and evaluation["step"] == 3
    assert evaluation["settings"]["model.rope_scaling"]["factor"] == 16.0
    assert (
        evaluation["trained_with"]["model.rope_scaling"] | {"enabled": True, "factor": 4.0}
        == evaluation["trained_with"]["model.rope_scaling"]
    )


def test_32k_starts_from_the_weights_of_8k_and_the_export_has_those_of_32k(
    stages: tuple[Stages, list[dict[str, Any]]],
) -> None:
    out = stages[0].out
    config = (out / "32k" / "config.yaml").read_text()
    assert f"init_from: {out / '8k' / 'checkpoints' / 'step_00000004'}" in config
    rope = json.loads((out / "export" / "config.json").read_text())["rope_parameters"]
    assert (rope["rope_type"], rope["factor"]) == ("llama3", 4.0)
    (common,) = (out / "32k" / "checkpoints" / "step_00000003" / "weights").glob("*.safetensors")
    (exported,) = (out / "export").glob("*.safetensors")
    with safe_open(common, "pt") as trained, safe_open(exported, "pt") as file:
        norm = file.get_tensor("model.norm.weight")
        assert any(trained.get_tensor(name).equal(norm) for name in list(trained.keys()))


def test_done_stages_are_skipped_until_something_changes(
    stages: tuple[Stages, list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    found, _ = stages
    before = len(found.started)
    assert found.run() == 0 and len(found.started) == before
    assert capsys.readouterr().err.count("done since") == 5
    # An export is neither overwritten nor believed to be another one.
    words, found.words = found.words, [*found.words, "export:add_bos=true"]
    assert found.run() == 3 and "exists, and is not known to be this export" in capsys.readouterr().err
    found.words = words
    # A result that is gone is made again, and nothing else.
    result = found.out / "32k" / "evaluations" / "at_4x.json"
    content = result.read_text()
    result.unlink()
    found.execute = lambda words: result.write_text(content) and int("--module=ssa_pretrain.evaluate" not in words)  # type: ignore[method-assign]
    assert found.run() == 0
