"""A run's folder on evaluate's command line: its configuration, its checkpoints, and other arguments."""

from pathlib import Path

import pytest

from ssa_pretrain import evaluate
from ssa_pretrain.cli import read_config
from ssa_pretrain.config import Config
from ssa_pretrain.errors import CheckpointError
from ssa_pretrain.saved_run import expand, named_checkpoint
from ssa_pretrain.settings.convert import config_from_dict, save_config

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS")
PLAN = ["dry_run=true", "model.vocab_size=4096"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A moved run folder with a checkpoint. Its configuration names the old path and a larger machine."""
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    tree = {
        "name": "saved",
        "output_dir": "outputs/where_it_was",
        "attention": {"method": "full"},
        "data": {"path": "nowhere"},
        "parallel": {"tp": 2, "world_size": 4, "sequence_parallel": True},
        "training": {"steps": 7, "global_batch_tokens": 4096},
        "checkpoint": {"init_from": "gone"},
    }
    config, problems = config_from_dict(Config, tree)
    assert not problems
    run = tmp_path / "it's moved, to a=b [1]"
    save_config(config, run / "config.yaml")
    (run / "checkpoints" / "step_00000007").mkdir(parents=True)
    (run / "checkpoints" / "step_00000007" / "checkpoint.json").write_text("{}")
    return run


def configured(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        read_config("evaluate", arguments)
    code = left.value.code
    assert isinstance(code, int)
    out, err = capsys.readouterr()
    return code, out, err


def test_run_folder_alone_is_a_complete_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = configured(str(folder), *PLAN, "name=mine", capsys=capsys)
    assert code == 0, err
    assert "run        mine\n" in out and "attention  full; " in out
    assert f"files      {folder}/" in out
    assert "python -m ssa_pretrain.evaluate " in out and "ssa_pretrain.train" not in out
    assert "1 process = tp 1 x pp 1 x cp 1 x dp 1" in out
    line = "the run's layout (tp 2, pp 1, cp 1) takes a multiple of 2 processes; on 1 process it is evaluated without\n"
    assert err == line


def test_given_layout_and_fitting_saved_layout_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert expand([str(folder), "parallel.tp=2"], 1)[1] == ""
    arguments, note = expand([str(folder)], 2)
    assert note == "" and not any(word.startswith("parallel.tp") for word in arguments)


def test_checkpoint_names_its_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = folder / "checkpoints" / "step_00000007"
    assert expand([str(checkpoint)], 2) == expand([str(folder)], 2)
    assert expand([f"{folder}@7"], 2) == expand([str(folder)], 2)
    named = [named_checkpoint([word]) for word in (str(checkpoint), f"{folder}@7", str(folder), "name=x")]
    assert named == [checkpoint, checkpoint, folder, None]
    monkeypatch.chdir(checkpoint.parent)
    assert expand(["step_00000007"], 2)[0][1] == str(folder)
    monkeypatch.chdir(folder)
    assert expand(["."], 2)[0][1] == "."


def test_engine_chooses_the_newest_checkpoint_and_flags_keep_their_values(folder: Path) -> None:
    arguments, _ = expand(["--cfg", "job", "-cd", "here", str(folder), "evaluation.rows=8"], 2)
    assert arguments[:2] == ["--config-path", str(folder)]
    assert arguments[-5:] == ["--cfg", "job", "-cd", "here", "evaluation.rows=8"]
    assert expand(["-cp", str(folder), "evaluation.rows=8"], 2) == (["-cp", str(folder), "evaluation.rows=8"], "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/empty"], "{}/empty is not a run's folder: {}/empty/config.yaml does not exist; give the output_dir of a run, or the run's own command line"),
        (["{}/none"], "{}/none is neither a run's folder nor key=value; give a folder that holds a run's config.yaml, or key=value"),
        (["{}/none@3"], "{}/none@3 does not exist: there is no {}/none/checkpoints/step_00000003; give a step that is kept"),
        (["{}/stray/step_1"], "{}/stray/step_1 is a checkpoint outside a run's folder: {}/config.yaml does not exist; give a checkpoint that lies in its run's folder"),
        (["{}/empty", "-cp", "conf"], "{}/empty is a run's folder, and --config-path names another configuration; give one of the two"),
    ],
)  # fmt: skip
def test_other_folder_prints_one_line_and_exits_with_3(
    arguments: list[str], message: str, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "stray" / "step_1").mkdir(parents=True)
    (tmp_path / "stray" / "step_1" / "checkpoint.json").write_text("{}")
    code, out, err = configured(*(word.format(tmp_path) for word in arguments), capsys=capsys)
    assert (code, out) == (3, "")
    assert err.splitlines()[1] == "  " + message.replace("{}", str(tmp_path))


def test_run_without_checkpoints_prints_one_line_and_exits_with_5(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_config(Config(), tmp_path / "new" / "config.yaml")
    with pytest.raises(CheckpointError):
        named_checkpoint([str(tmp_path / "new")])
    monkeypatch.setattr("sys.argv", ["evaluate", str(tmp_path / "new"), "evaluation.rows=8"])
    with pytest.raises(SystemExit) as left:
        evaluate.main()
    assert left.value.code == 5
    sentence = f"{tmp_path / 'new'} holds no checkpoint; wait for the run's first one, or give another run's folder\n"
    assert capsys.readouterr().err == sentence


def test_problems_of_a_saved_configuration_are_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "config.yaml").write_text("optim: {lrr: 1}\n")
    code, _, err = configured(str(folder), capsys=capsys)
    assert code == 3
    assert "  optim.lrr=1 is not a known key; did you mean optim.lr?\n" in err
