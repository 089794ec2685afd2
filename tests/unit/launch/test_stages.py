"""The stages command without training: its command line, messages, dry run and state, the data check, and what it refuses to continue."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ssa_pretrain.errors import CheckpointError, CommandError, DataError, Interrupted, LaunchError
from ssa_pretrain.launch.stages import command, data_check
from ssa_pretrain.launch.stages.options import STAGES, read_stages, recipes
from ssa_pretrain.launch.stages.plan import Stage, finished, require_intact
from ssa_pretrain.launch.stages.state import DONE, RUNNING, State, table
from ssa_pretrain.launch.supervision import Supervisor
from support.processes import ROOT
from support.small_datasets import cut, write_dataset

FLAGS = ["--recipe=ssa_1b", "--out=o"]


def test_settings_go_to_their_stages() -> None:
    words = ["--nnodes", "2", "--nproc_per_node=8", "--rdzv-endpoint=h:1", "data.path=D", "32k:optim.lr=1", "~a.b"]
    found = read_stages([*FLAGS, *words, "evaluation:evaluation.rows=8", "export:dtype=fp32", "data.path=a:b=c"])
    both = ["data.path=D", "~a.b", "data.path=a:b=c"]
    assert found.settings == {
        "8k": both,
        "32k": ["data.path=D", "optim.lr=1", *both[1:]],
        "evaluation": ["evaluation.rows=8"],
        "export": ["dtype=fp32"],
    }
    flags = ["--nnodes=2", "--nproc-per-node=8", "--rdzv-endpoint=h:1", "--rdzv-id=ssa_pretrain-32k"]
    assert found.launcher_flags("32k") == flags


def test_recipes_are_the_experiments_of_both_lengths() -> None:
    assert recipes() == ["full_1b", "full_300m", "moba_1b", "moba_300m", "nsa_1b", "nsa_300m", "ssa_1b", "ssa_300m"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe=ssa_1b"], "--out must name the folder of all stages; try --out=outputs/ssa_1b"),
        (
            ["--out=o", "--recipe=ssa_3b"],
            "--recipe=ssa_3b must be full_1b, full_300m, moba_1b, moba_300m, nsa_1b, nsa_300m, ssa_1b or ssa_300m",
        ),
        (["--out=o"], "--recipe must be full_1b, "),
        ([*FLAGS, "--nnodes=x"], "--nnodes=x must be a positive number; try 1"),
        ([*FLAGS, "output_dir=a"], "output_dir=a is given by the stages themselves; use --out, below which"),
        ([*FLAGS, "32k:checkpoint.init_from=a"], "leave it out: 32k starts from the weights of 8k"),
        ([*FLAGS, "experiment=quickstart"], "use --recipe, which names both experiments"),
        (
            [*FLAGS, "64k:optim.lr=1"],
            "64k:optim.lr=1 is not a setting of a stage; begin it with 8k:, 32k:, evaluation:, export:",
        ),
        ([*FLAGS, "8k:fast"], "8k:fast is not KEY=VALUE; flags of the launcher come before the settings"),
    ],
)
def test_messages(words: list[str], message: str) -> None:
    with pytest.raises(LaunchError) as refused:
        read_stages(words)
    assert message in str(refused.value) and refused.value.exit_code == 3


def test_problems_of_all_stages_are_reported_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--recipe=ssa_300m",
        f"--out={tmp_path / 'o'}",
        "--nproc-per-node=1",
        "model.vocab_size=4096",
        "data.path=/nope",
    ]
    words += [
        "8k:optim.lrr=1",
        "32k:attention.top_k=0",
        "export:dtype=fp8",
        "precision=fp32",
        "attention.impl=reference",
    ]
    assert command.main(words, {}) == 3
    errors = capsys.readouterr().err
    assert "8k:optim.lrr=1 is not a known key; did you mean optim.lr?" in errors
    assert "32k:attention.top_k=0 must be at least 1" in errors and "stages: 5 problems; nothing was started." in errors
    assert "export:dtype=fp8 must be " in errors and not (tmp_path / "o").exists()


def test_dry_run_prints_every_command_and_both_plans(tmp_path: Path) -> None:
    """The one test of the script itself. The evaluation has four times the length, four times the factor of RoPE and a quarter of the rows."""
    words = ["--python", sys.executable, "--recipe", "moba_300m", "--out", str(tmp_path / "o"), "--nproc-per-node", "8"]
    words += ["--dry-run", "data.path=D", "model.vocab_size=4096", "8k:layout=gpus_8_8k", "32k:layout=gpus_8_32k"]
    variables = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run([ROOT / "launchers" / "stages.sh", *words], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    commands = [line for line in lines if " -m ssa_pretrain.launch" in line]
    assert len(commands) == len(STAGES) and not (tmp_path / "o").exists()
    start = f"checkpoint.init_from={tmp_path}/o/8k/checkpoints/step_00031790"
    assert commands[2].endswith(start) and "experiment=moba_300m_32k" in commands[2]
    evaluated = (
        "data.sequence_length=131072 model.rope_scaling.enabled=true model.rope_scaling.factor=16.0 evaluation.rows=32"
    )
    assert f"{tmp_path}/o/32k/checkpoints/step_00001590 {evaluated}" in commands[3]
    assert sum(line.startswith("layout     8 processes = tp 1 x pp 1 x cp 1 x dp 8") for line in lines) == 2


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    documents = {name: cut(300, seed=seed) for seed, name in enumerate(("a", "b", "c"))}
    write_dataset(tmp_path / "data", documents, {"h": [np.arange(50)]})
    return tmp_path / "data"


def test_data_check_goes_on_with_the_files_that_it_has_not_read(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verdicts, read = tmp_path / "verdicts", []
    monkeypatch.setattr(data_check, "THREADS", 1)
    monkeypatch.setattr(data_check, "SAVE_SECONDS", -1.0)
    hashing = data_check.file_sha256

    def stops(path: Path) -> str:
        read.append(path.name)
        if len(read) == 3:
            raise KeyboardInterrupt
        return hashing(path)

    monkeypatch.setattr(data_check, "file_sha256", stops)
    with pytest.raises(KeyboardInterrupt):
        data_check.check([dataset], verdicts)
    kept = data_check.known(verdicts)
    assert {Path(name).name for name, *_ in kept} == set(read[: len(kept)]) and kept
    with pytest.raises(DataError, match="has changed since it was checked"):
        data_check.require_checked(dataset, verdicts)
    read.clear()
    read += ["", "", ""]
    data_check.check([dataset], verdicts)
    assert len(read) - 3 == 4 - len(kept) and "4 shards intact" in capsys.readouterr().err
    data_check.require_checked(dataset, verdicts)


def test_data_check_finds_a_changed_byte_and_a_change_after_the_check(dataset: Path, tmp_path: Path) -> None:
    verdicts, file = tmp_path / "verdicts", dataset / "b_0.bin"
    data_check.check([dataset], verdicts)
    content = bytearray(file.read_bytes())
    content[10] ^= 1
    file.write_bytes(content)  # the same size
    with pytest.raises(DataError, match=r"b_0\.bin has changed since it was checked"):
        data_check.require_checked(dataset, verdicts)
    with pytest.raises(DataError, match=r"b_0\.bin has sha256 .*, its manifest has .*; "):
        data_check.check([dataset], verdicts)


def test_damaged_state_and_damaged_checkpoint_are_refused(tmp_path: Path) -> None:
    (tmp_path / "stages.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"stages\.json cannot be read .*move it away"):
        State(tmp_path)
    with pytest.raises(CheckpointError, match=r"is damaged .*restore it, or remove it"):
        require_intact(tmp_path)
    with pytest.raises(
        Interrupted, match=r"/8k has ended before its last step 10 \(training.stop_at_step\?\); run the same"
    ):
        finished(tmp_path / "8k" / "checkpoints" / "step_00000010")


def stage(name: str, tmp_path: Path, weights: str) -> Stage:
    """Returns a stage whose result is a file, from given weights."""

    def outputs() -> dict[str, str]:
        if not (tmp_path / "result").exists():
            raise CheckpointError("result does not exist")
        return {"result": (tmp_path / "result").read_text()}

    inputs = lambda: {"weights": weights}  # noqa: E731
    return Stage(name, name, "ssa_pretrain.train", ["a=1"], inputs, lambda: None, outputs, repeatable=name == "data")


def test_what_was_done_is_done_again_only_if_it_may(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other weights would silently join two histories; a result that is gone means a loss that somebody should know of."""
    state, options = State(tmp_path), read_stages(["--recipe=ssa_1b", f"--out={tmp_path}"])
    started: list[int] = []

    def execute(_: list[str]) -> int:
        started.append(1)
        (tmp_path / "result").write_text("x")
        (tmp_path / "32k" / "checkpoints" / "step_00000001").mkdir(parents=True, exist_ok=True)
        return 0

    assert command.run_stage(stage("32k", tmp_path, "w1"), state, options, execute) == 0
    assert state["32k"].status == DONE and len(started) == 1
    assert command.run_stage(stage("32k", tmp_path, "w1"), State(tmp_path), options, execute) == 0 and len(started) == 1
    assert command.run_stage(stage("32k", tmp_path, "w2"), state, options, execute) == 5 and len(started) == 1
    assert "began from other weights" in capsys.readouterr().err
    state.change("32k", DONE)
    (tmp_path / "result").unlink()
    assert command.run_stage(stage("32k", tmp_path, "w1"), state, options, execute) == 5 and len(started) == 1
    assert command.run_stage(stage("data", tmp_path, "w1"), state, options, execute) == 0 and len(started) == 2
    (tmp_path / "result").unlink()
    assert command.run_stage(stage("data", tmp_path, "w1"), state, options, execute) == 0 and len(started) == 3
    assert "32k         failed" in table(state) and "checkpoint of step 1, exit code 5" in table(state)


def test_exit_codes_and_states(tmp_path: Path) -> None:
    state, options = State(tmp_path), read_stages(["--recipe=ssa_1b", f"--out={tmp_path}"])
    for code, status in ((4, "failed"), (7, "stopped"), (130, "stopped"), (1, "failed")):
        assert command.run_stage(stage("8k", tmp_path, "w"), state, options, lambda _, code=code: code) == code
        assert (state["8k"].status, state["8k"].code) == (status, code)
    assert State(tmp_path)["8k"].words == ["a=1"]


def test_signal_is_passed_on_and_a_killed_program_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    stops = "import os, signal, sys, time; signal.signal(15, lambda *_: sys.exit(7)); os.kill(os.getppid(), 15); time.sleep(60)"
    killed = "import os; os.kill(os.getpid(), 9)"
    for code, program in ((5, "raise SystemExit(5)"), (1, killed), (7, stops)):
        with Supervisor(float("inf")) as supervisor:
            assert command.supervised(supervisor, [sys.executable, "-c", program], os.environ) == code
    assert "was killed by signal 9; run the same command again to continue" in capsys.readouterr().err


def test_folder_of_another_recipe_or_in_use_is_refused(tmp_path: Path) -> None:
    state = State(tmp_path)
    state.recipe = "full_1b"
    state.change("8k", RUNNING)
    options = read_stages(["--recipe=ssa_1b", f"--out={tmp_path}"])
    with pytest.raises(CommandError, match="has the stages of --recipe=full_1b; choose another folder"):
        command.run(options, None, lambda _: 0)  # pyright: ignore[reportArgumentType]
    options.out = tmp_path / "stages.json"
    with pytest.raises(CommandError, match=r"stages.json is a file, not a folder; choose another folder"):
        command.run(options, None, lambda _: 0)  # pyright: ignore[reportArgumentType]
