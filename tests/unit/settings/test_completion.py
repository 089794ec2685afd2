"""Shell completion: the function that `-sc install=…` prints, called as bash and zsh call it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ssa_pretrain.cli import CONF, read_config
from ssa_pretrain.config import Config
from ssa_pretrain.settings.completion import candidates

PYTHON = "python -m ssa_pretrain.train"


def completed(typed: str) -> list[str]:
    return candidates(f"{PYTHON} {typed}", Config, CONF)


def test_groups_options_keys_values_and_flags() -> None:
    assert completed("attention=") == ["attention=full ", "attention=indexer ", "attention=moba ", "attention=ssa "]
    assert completed("experiment=qui") == ["experiment=quickstart "]
    assert completed("optim.l") == ["optim.lr="] and completed("++optim.l") == ["++optim.lr="]
    assert {"optim=", "optim.lr="} <= set(completed("opt")) and "experiment=" in completed("")
    assert completed("attention.method=m") == ["attention.method=moba "]
    assert completed("dry_run=") == ["dry_run=true ", "dry_run=false "]
    assert completed("--dr") == ["--dry-run "]
    assert completed("--explain optim.w") == ["optim.warmup_fraction ", "optim.weight_decay "]
    assert completed("data.path=outp") == []  # files


def test_options_of_a_user_folder_are_completed(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").touch()
    assert completed(f"-cd {tmp_path} experiment=mi") == ["experiment=mine "]


def test_group_of_one_program_is_completed_for_it_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMP_LINE", "python -m ssa_pretrain.plan hardware=h1")
    with pytest.raises(SystemExit) as left:
        read_config("plan", ["-sc", "query=bash"])
    assert (left.value.code, capsys.readouterr().out) == (0, "hardware=h100 \n")
    assert completed("hardw") == []


def test_unknown_request_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        read_config("train", ["-sc", "install=fish"])
    assert left.value.code == 3
    line = "  --shell-completion=install=fish must be install=bash or install=zsh; try eval "
    assert capsys.readouterr().err.splitlines()[1].startswith(line)


# Each line: what was typed; its completions, joined by |. bash breaks words at =, zsh does not.
LINES = ["attention=", "experiment=qui", "optim.l", "--dr"]
EXPECTED = {
    "bash": ["full |indexer |moba |ssa ", "quickstart ", "optim.lr=", "--dry-run "],
    "zsh": [
        "attention=full|attention=indexer|attention=moba|attention=ssa",
        "experiment=quickstart",
        "optim.lr=",
        "--dry-run",
    ],
}


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_shell_function(shell: str) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    lines = [f'eval "$({PYTHON} -sc install={shell})"', 'show() { local IFS="|"; echo "${COMPREPLY[*]}"; }']
    for typed in LINES:
        line = f"{PYTHON} {typed}"
        lines += [f"COMP_LINE='{line} and more'", f"COMP_POINT={len(line)}", "_ssa_pretrain_complete", "show"]
    lines += ["COMP_LINE='python other.py opt'", "COMP_POINT=19", "_ssa_pretrain_complete", "show"]
    if shell == "bash":
        lines += ["complete -p python"]
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(CONF.parent),
    }
    flags = ["--norc", "-c"] if shell == "bash" else ["-f", "-c"]
    done = subprocess.run(
        [shell, *flags, "\n".join(lines)], env=environment, capture_output=True, text=True, timeout=60
    )
    found = done.stdout.splitlines()
    assert found[:5] == [*EXPECTED[shell], ""], done.stderr
    if shell == "bash":
        assert "-F _ssa_pretrain_complete python" in found[5]
