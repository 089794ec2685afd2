"""The commands of launchers/quickstart.sh: text, training, evaluation and report, in this order. Stdlib only."""

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssa_pretrain.errors import LaunchError

HAS_PACKAGE = 'import importlib.util, sys; sys.exit(importlib.util.find_spec("ssa_pretrain") is None)'
PROCESSES = 2
HEADINGS = (
    "[1/4] Text: English and Python into indexed binaries",
    "[2/4] Training: two processes, tensor parallel",
    "[3/4] Evaluation: the held-out text with full and with sparse attention, and samples",
    "[4/4] Report",
)


@dataclass(slots=True)
class Quickstart:
    """A quickstart as asked for on the command line.

    Attributes:
        venv: the virtual environment.
        out: the folder for everything.
        dry_run: only print the commands.
        settings: settings of the run, KEY=VALUE.
    """

    venv: str = ".venv"
    out: str = "outputs/quickstart"
    dry_run: bool = False
    settings: Sequence[str] = ()

    @property
    def python(self) -> str:
        """The interpreter of all commands."""
        return str(Path(self.venv) / "bin" / "python")

    @property
    def run(self) -> list[str]:
        """The arguments that name the run."""
        return ["experiment=quickstart", f"output_dir={self.out}", f"data.path={self.out}/data", *self.settings]

    @property
    def check(self) -> list[str]:
        """The command that reports a bad setting before the text is prepared."""
        given = ["parallel=tp2", f"parallel.world_size={PROCESSES}", "model.vocab_size=4096"]
        return [self.python, "-m", "ssa_pretrain.plan", *given, *self.run]

    def commands(self, *training: str) -> list[tuple[str, list[str]]]:
        """Returns the commands with their headings; `training` starts the processes of the run."""
        data = [self.python, "-m", "data_prep", "source=quickstart", "tokenizer=bpe4k", f"out={self.out}/data"]
        train = [self.python, "-m", *training, "parallel=tp2", *self.run]
        evaluate = [self.python, "-m", "ssa_pretrain.evaluate", "evaluation.rows=128", *self.run]
        report = [self.python, "-m", "ssa_pretrain.report", self.out]
        return list(zip(HEADINGS, (data, train, evaluate, report), strict=True))

    def shown(self) -> list[tuple[str, list[str]]]:
        """Returns the commands as they could be given by hand."""
        torchrun = ("torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}")
        return self.commands(*torchrun, "-m", "ssa_pretrain.train")

    def started(self) -> list[tuple[str, list[str]]]:
        """Returns the commands that run: training under its launcher."""
        return self.commands("ssa_pretrain.launch", "torchrun", f"--nproc-per-node={PROCESSES}", "--")

    def missing(self) -> str:
        """Returns why the environment cannot run the commands; empty if it can."""
        if not shutil.which(self.python):
            remedy = "run make quickstart, which builds .venv, or --venv=DIR of an environment with this project"
            return f"--venv={self.venv} has no bin/python; {remedy}"
        if subprocess.run([self.python, "-c", HAS_PACKAGE], stderr=subprocess.DEVNULL, check=False).returncode:
            remedy = f"run make quickstart, which builds .venv, or {self.python} -m pip install -e ."
            return f"--venv={self.venv} has no package ssa_pretrain; {remedy}"
        return ""


def read_quickstart(words: Sequence[str]) -> Quickstart:
    """Returns the quickstart of a command line; flags and settings may be mixed. Raises LaunchError."""
    found, settings, rest = Quickstart(), [], list(words)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        if not word.startswith("-"):
            require_allowed(flag.lstrip("+"), word, value)
            settings.append(word)
            continue
        flag = flag.replace("_", "-")
        if flag == "--dry-run":
            if equals:
                raise LaunchError(f"--dry-run takes no value; leave out ={value}")
            found.dry_run = True
        elif flag in ("--venv", "--out"):
            value = value if equals else rest.pop(0) if rest else ""
            if not value:
                raise LaunchError(f"{flag} needs a value; see --help")
            setattr(found, flag[2:], value)
        else:
            raise LaunchError(f"{word} is not a flag; see --help")
    found.settings = settings
    return found


def require_allowed(key: str, word: str, value: str) -> None:
    """Raises LaunchError for a setting that would give one of the programs another folder than the others."""
    if key == "output_dir":
        raise LaunchError(f"use --out instead of {word}, which all four programs follow; try --out={value}")
    if key == "data.path":
        advice = "its folder data/ has the text; try --out=DIR, or launchers/torchrun.sh for other data"
        raise LaunchError(f"use --out instead of {word}: {advice}")


def quickstart_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of all commands: no GPU, so that the job is the same on every machine, and one thread per process unless set."""
    return {"OMP_NUM_THREADS": "1"} | dict(environment) | {"CUDA_VISIBLE_DEVICES": ""}
