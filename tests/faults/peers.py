"""Rows about ranks: one that dies, leaves, hangs or is slow; the others must end and say so."""

import ctypes
import os
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from functools import partial

from faults.rows import Row
from faults.stage import SETTINGS, Stage, damaged, steps_of
from faults.tally import Tally
from ssa_pretrain import trainer
from ssa_pretrain.parallel import watchdog
from support.processes import environment, free_port
from support.rank_for_watchdog import hang
from support.training import descendants, launched, rank_of, records, wait_for_checkpoint, wait_for_step


def at_step(step: int, rank: int, act: Callable[[], object]) -> None:
    """Lets a rank do something before a step."""
    plain = trainer.train_step

    def train_step(run, done):
        if done == step and run.placement.rank == rank:
            act()
        return plain(run, done)

    trainer.train_step = train_step


def out_of_memory() -> None:
    """Takes memory until there is none."""
    resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
    found = []
    while True:
        found.append(bytearray(2**26))


def dying_rank(stage: Stage) -> Tally:
    """One of two ranks ends in different ways; the other one must end too, and no code may be 0."""
    tally = Tally()
    ways: dict[str, Callable[[], object]] = {
        "kill -9": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "segmentation fault": lambda: ctypes.string_at(0),
        "exit with 0": lambda: os._exit(0),
        "an exception": lambda: 1 / 0,
        "out of memory": out_of_memory,
    }
    for number in range(stage.tries(10, 2)):
        name, act = list(ways.items())[number % len(ways)]
        folder, rank = stage.new_folder(), number % 2
        config = stage.config(folder, training__steps=1000, checkpoint__interval=2)
        children = stage.train_ranks(config, 2, before=partial(at_step, 5, rank, act))
        children[rank].wait()
        begin = time.monotonic()
        code = children[1 - rank].wait(60)
        seconds = time.monotonic() - begin
        tally.detect.append(seconds)
        wrong = "; ".join(damaged(folder)) or (
            f"{name}: the other rank ended with {code} after {seconds:.0f} s"
            if code in (0, -9) or seconds > 30
            else None
        )
        tally.add(wrong, code=code, lost=5 - max(steps_of(folder), default=0))
    return tally


def hanging_rank(stage: Stage) -> Tally:
    """One of two ranks is stopped, loops, or hangs in C code with Python's lock held."""

    def install(rank: int, mode: str) -> None:
        watchdog.ANSWER_SECONDS, watchdog.WARM_STEPS = 2.0, 2
        at_step(8, rank, partial(hang, mode))

    tally = Tally()
    for mode in ("stops", "loops", "locks")[: stage.tries(3, 1)]:
        for rank in (0, 1)[: stage.tries(2, 1)]:
            folder = stage.new_folder()
            config = stage.config(folder, training__steps=1000, checkpoint__interval=2, parallel__hang_minutes=0.05)
            children = stage.train_ranks(config, 2, before=partial(install, rank, mode))
            children[0].until(lambda folder=folder: has_step_8(folder))
            begin = time.monotonic()
            code = children[1 - rank].wait(90)
            tally.detect.append(time.monotonic() - begin)
            children[rank].kill(signal.SIGKILL)
            children[rank].wait()
            report = (folder / "hang.txt").read_text() if (folder / "hang.txt").exists() else ""
            text = children[1 - rank].text() + report
            named = f"hang: rank {rank} ({socket.gethostname()}" in text
            wrong = None if code == 8 and named else f"{mode} on rank {rank}: exit code {code}, {text[-400:]}"
            tally.add(wrong or "; ".join(damaged(folder)) or None, code=code, lost=8 - max(steps_of(folder), default=0))
    return tally


def has_step_8(folder) -> bool:
    """Returns whether step 8, after which the rank hangs, is in the metrics."""
    path = folder / "metrics.jsonl"
    return path.exists() and '"step": 8,' in path.read_text()


def straggler(stage: Stage) -> Tally:
    """One of two ranks needs much longer for its own part of a step."""

    def install(rank: int) -> None:
        plain = trainer.training_batches

        def slow(*arguments, dp_rank: int, **options):
            end = time.thread_time() + 0.1 * (dp_rank == rank)
            while time.thread_time() < end:
                pass
            return plain(*arguments, dp_rank=dp_rank, **options)

        trainer.training_batches = slow

    tally = Tally()
    for rank in (0, 1)[: stage.tries(2, 1)]:
        folder = stage.new_folder()
        children = stage.train_ranks(
            stage.config(folder, training__steps=65, training__global_batch_tokens=128),
            2,
            before=partial(install, rank),
        )
        codes, text = [child.wait() for child in children], children[0].text()
        named = [line for line in text.splitlines() if f"rank {rank} (" in line and "slow" in line]
        other = [line for line in text.splitlines() if f"rank {1 - rank} (" in line and "slow" in line]
        tally.add(
            None if named and not other and not any(codes) else f"exit codes {codes}: {text[-300:]}", code=codes[0]
        )
        tally.figures["false alarms"] = tally.figures.get("false alarms", 0) + len(other)
    return tally


def restarted(stage: Stage) -> Tally:
    """A rank is killed under launchers/torchrun.sh, which starts the run again by itself."""
    tally = Tally()
    for _ in range(stage.tries(1, 1)):
        folder, whole = stage.new_folder(), stage.new_folder()
        overrides = [
            *SETTINGS,
            f"data.path={stage.corpus}",
            "training.steps=100000",
            "training.stop_at_step=400",
            "checkpoint.interval=10",
        ]
        config = stage.config(whole, training__steps=100_000, training__stop_at_step=400)
        children = stage.train_ranks(config, 2)
        assert [child.wait(300) for child in children] == [0, 0], children[0].text()[-500:]
        log = folder.with_suffix(".txt")
        command = launched("torchrun.sh", *overrides, f"output_dir={folder}", restarts=2)
        with log.open("w") as file, subprocess.Popen(command, env=environment(), stdout=file, stderr=file) as launcher:
            wait_for_step(launcher, folder, 25, seconds=200, output=lambda log=log: log.read_text()[-2000:])
            wait_for_checkpoint(launcher, folder, 20, seconds=60)
            begin, last = time.monotonic(), records(folder, "train")[-1]["step"]
            os.kill(next(pid for pid in descendants(launcher.pid) if rank_of(pid) == "1"), signal.SIGKILL)
            while "resuming after step" not in log.read_text() and launcher.poll() is None:
                time.sleep(0.05)
            tally.recover.append(time.monotonic() - begin)
            code = launcher.wait(timeout=300)
        same = records(folder, "train") == records(whole, "train")
        problem = (
            None
            if code == 0 and same
            else f"exit code {code}, curve {'same' if same else 'differs'}: {log.read_text()[-400:]}"
        )
        tally.add(problem, code=code, lost=last % 10)
    return tally


def port_in_use(stage: Stage) -> Tally:
    """Another program listens on the port of the ranks' store."""
    tally = Tally()
    with socket.socket() as taken:
        port = free_port()
        taken.bind(("127.0.0.1", port))
        taken.listen()
        variables = {
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": "0",
            "LOCAL_RANK": "0",
        }
        child = stage.train(stage.config(stage.new_folder()), rank=variables)
        code, text = child.wait(60), child.text()
        tally.add(
            None if code == 3 and str(port) in text and "Traceback" not in text else f"exit code {code}: {text[-300:]}",
            code=code,
        )
    return tally


ROWS = [
    Row(
        "dying_rank",
        "one of two ranks ends by kill -9, a segmentation fault, exit(0), an exception, no memory",
        "the other one ends within seconds, never with 0; checkpoints are intact",
        dying_rank,
        must_fail=True,
    ),
    Row(
        "restarted",
        "kill -9 of a rank under launchers/torchrun.sh",
        "the launcher starts the run again; the curve is bit-identical",
        restarted,
    ),
    Row(
        "hanging_rank",
        "one of two ranks is stopped (SIGSTOP), loops for ever, hangs in C code with Python's lock held; limit 3 s",
        "8; rank and host are named, the stacks are in hang.txt",
        hanging_rank,
        must_fail=True,
    ),
    Row(
        "straggler",
        "one of two ranks needs 0.1 s more of its own time per step",
        "named within 65 steps; the other one is not",
        straggler,
    ),
    Row("port_in_use", "another program listens on the ranks' port", "3, with the port", port_in_use, must_fail=True),
]
