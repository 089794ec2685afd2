"""Where the tries of the matrix run: children of one process that has imported torch and megatron-core and read the configuration once.

A child trains with the real trainer, in the real wrapper of a rank, so its signals, messages and exit codes are those of `python -m
ssa_pretrain.train`. What it does not repeat is the start of Python, the imports and Hydra, which take ten times as long as the rest of a try. The objects that exist
by then are left out of garbage collection, because core collects at each save.
"""

import copy
import gc
import os
import random
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ssa_pretrain.engine.megatron.engine  # noqa: F401 - imported before the first fork
from ssa_pretrain import trainer
from ssa_pretrain.checkpoint.find import published, step_of
from ssa_pretrain.checkpoint.integrity import find_damage
from ssa_pretrain.cli import resolve_config
from ssa_pretrain.config import Config
from ssa_pretrain.config.machine import this_machine
from ssa_pretrain.libraries import hide_library_warnings
from ssa_pretrain.process import rank_process
from support.processes import free_port
from support.small_datasets import write_dataset

VOCAB = 250
SETTINGS = (
    "experiment=quickstart",
    "model=tiny",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.num_attention_heads=4",
    "model.num_kv_heads=2",
    "model.head_dim=8",
    "data.sequence_length=64",
    "attention.block_size=16",
    "attention.top_k=2",
    "training.global_batch_tokens=128",
    "training.micro_batch_size=1",
    "training.steps=100",
    "checkpoint.interval=0",
    "checkpoint.weights=false",
    "evaluation.rows=2",
    "evaluation.at_start=false",
    "evaluation.interval=0",
    "logging.interval=1",
    "logging.wandb.mode=off",
)


@dataclass(slots=True)
class Child:
    """A child process: its id, and the file with all that it prints."""

    pid: int
    log: Path
    begin: float
    code: int | None = None

    def is_running(self) -> bool:
        """Returns whether it has not ended yet."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is None

    def wait(self, seconds: float = 120.0) -> int:
        """Returns its exit code, negative for a signal; kills it after some seconds, which counts as a hang (code -9)."""
        deadline = time.monotonic() + seconds
        while self.is_running():
            if time.monotonic() > deadline:
                self.kill()
                print(f"a child hung: {self.text()[-2000:]}", file=sys.stderr)
            time.sleep(0.002)
        assert self.code is not None
        return self.code

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def text(self) -> str:
        """Returns what it has printed so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def until(self, condition: Callable[[], Any], seconds: float = 60.0) -> bool:
        """Waits until a condition holds; returns False if the process ends or the time is up before."""
        deadline = time.monotonic() + seconds
        while not condition():
            if not self.is_running() or time.monotonic() > deadline:
                return bool(condition())
            time.sleep(0.001)
        return True


class Stage:
    """The process from which all tries are forked.

    Args:
        folder: for scratch files, on fast storage; removed by `close`.
        scale: share of the tries of a full matrix.
    """

    def __init__(self, folder: Path, scale: float = 1.0) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        os.environ["OMP_NUM_THREADS"] = "1"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        torch.set_num_threads(1)
        hide_library_warnings()
        self.folder, self.scale, self.random = folder, scale, random.Random(1)
        self.corpus = self.write_corpus(folder / "corpus")
        arguments = [*SETTINGS, f"data.path={self.corpus}", f"output_dir={folder / 'unused'}"]
        self._config = resolve_config("train", arguments, this_machine())
        self._count = 0
        gc.collect()
        gc.freeze()

    def close(self) -> None:
        """Removes the scratch files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def tries(self, full: int, least: int = 2) -> int:
        """Returns how many tries of a row are run: all of a full matrix, fewer of a smaller one."""
        return max(least, round(full * self.scale))

    def write_corpus(self, folder: Path, *, parts: int = 1, seed: int = 0) -> Path:
        """Writes a dataset of random documents and returns its folder."""
        generator = np.random.default_rng(seed)

        def documents(count: int) -> list[np.ndarray]:
            return [generator.integers(1, VOCAB, length) for length in generator.integers(20, 200, count)]

        train = {f"part{n}": documents(120) for n in range(parts)}
        write_dataset(folder, train, {"part0": documents(20)}, vocab_size=VOCAB)
        return folder

    def new_folder(self) -> Path:
        """Returns the name of a folder that does not exist."""
        self._count += 1
        return self.folder / f"try{self._count}"

    def config(self, folder: Path, **changes: Any) -> Config:
        """Returns the configuration of a run in `folder`; names of settings have two underscores in place of the dot."""
        config = copy.deepcopy(self._config)
        config.output_dir = str(folder)
        for name, value in changes.items():
            *path, last = name.split("__")
            owner = config
            for part in path:
                owner = getattr(owner, part)
            setattr(owner, last, value)
        return config

    def fork(self, act: Callable[[], Any], *, variables: dict[str, str] | None = None, stopped: bool = False) -> Child:
        """Runs a function in a child and returns at once.

        Args:
            act: the function; what it raises becomes the exit code as in any Python program.
            variables: of the environment.
            stopped: the child stops itself first, for a tracer.
        """
        self._count += 1
        log = self.folder / f"log{self._count}.txt"
        sys.stdout.flush()
        sys.stderr.flush()
        begin = time.monotonic()
        pid = os.fork()
        if pid:
            return Child(pid, log, begin)
        code = 1
        try:
            os.environ.update(variables or {})
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)
            warnings.simplefilter("ignore")
            if stopped:
                os.kill(os.getpid(), signal.SIGSTOP)
            act()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1 if error.code else 0
        except BaseException:  # noqa: BLE001 - as Python ends a program
            traceback.print_exc()
        finally:
            with suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def train(
        self,
        config: Config,
        *,
        before: Callable[[], None] | None = None,
        stopped: bool = False,
        rank: dict[str, str] | None = None,
    ) -> Child:
        """Starts a child that trains.

        Args:
            config: the run's.
            before: called in the child before it trains, to install a fault.
            stopped: the child stops itself first, for a tracer.
            rank: variables of a launcher.
        """

        def act() -> None:
            with rank_process("stopped before training began; the same command starts it again"):
                if before:
                    before()
                trainer.train(config)

        return self.fork(act, variables=rank, stopped=stopped)

    def train_ranks(self, config: Config, count: int, *, before: Callable[[], None] | None = None) -> list[Child]:
        """Starts a child per rank; each gets its own copy of the layout's variables."""
        common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        ranks = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        return [self.train(config, before=before, rank=variables) for variables in ranks]


@contextmanager
def stage(folder: Path, scale: float = 1.0) -> Iterator[Stage]:
    """A stage that is removed at the end."""
    found = Stage(folder, scale)
    try:
        yield found
    finally:
        found.close()


def steps_of(folder: Path) -> list[int]:
    """Returns the steps of a run's published checkpoints, oldest first."""
    return sorted(step_of(path) for path in published(folder))


def damaged(folder: Path) -> list[str]:
    """Returns what is wrong with a run's published checkpoints."""
    found = ((path, find_damage(path)) for path in published(folder))
    return [f"{path.name}: {damage}" for path, damage in found if damage]


def flip(path: Path, generator: random.Random) -> None:
    """Flips a random bit of a file."""
    place, bit = generator.randrange(path.stat().st_size), 1 << generator.randrange(8)
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ bit]))


def pick(paths: Sequence[Path], generator: random.Random) -> Path:
    """Returns a random file; a larger one is more likely."""
    files = [path for path in paths if path.is_file() and path.stat().st_size]
    return generator.choices(files, weights=[path.stat().st_size for path in files])[0]
