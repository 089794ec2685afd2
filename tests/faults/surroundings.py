"""Rows about what a run stands on: a full or slow disk, a save that crashes, W&B that does not answer, a clock that jumps, a second run."""

import errno
import os
import random
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from faults.peers import at_step
from faults.rows import Row
from faults.stage import Stage, damaged, steps_of
from faults.tally import Tally
from ssa_pretrain import saving
from ssa_pretrain.checkpoint import publish, storage
from support.training import records

STEPS = 8


def whole_run(stage: Stage, ranks: int = 1) -> list[dict]:
    """Returns the training records of a run without a fault."""
    folder = stage.new_folder()
    children = stage.train_ranks(stage.config(folder, training__steps=STEPS), ranks)
    assert {child.wait() for child in children} == {0}
    return records(folder, "train")


def limit_files(folder: Path, most: int) -> None:
    """Lets no file of this process grow past some bytes, once the save of step 2 is over."""
    while not (folder / "checkpoints/step_00000002").exists():
        time.sleep(0.01)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))


def full_disk(stage: Stage) -> Tally:
    """Saves where no file may grow past a limit, and on a file system that is full."""
    tally, whole = Tally(), whole_run(stage)
    for number in range(stage.tries(8, 2)):
        folder = stage.new_folder()
        config = stage.config(folder, training__steps=STEPS, checkpoint__interval=2, checkpoint__max_failed_saves=0)
        config.checkpoint.asynchronous = number % 2 == 1
        most = stage.random.randrange(20_000, 40_000)
        child = stage.train(config, before=partial(at_step, 3, 0, partial(limit_files, folder, most)))
        tally.add(_full(stage, folder, child.wait(), child.text(), whole), code=child.code, lost=1)
    mount = stage.new_folder()
    mount.mkdir()
    is_mounted = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1500k", "none", str(mount)], capture_output=True, check=False
        ).returncode
        == 0
    )
    tally.figures["a full file system"] = "tried" if is_mounted else "needs the right to mount"
    if is_mounted:
        try:
            folder = mount / "run"
            config = stage.config(folder, training__steps=STEPS, checkpoint__interval=1, checkpoint__keep=9)
            config.checkpoint.max_failed_saves = 0
            child = stage.train(config)
            code, text, found = child.wait(), child.text(), steps_of(folder)
            wrong = (
                code != 5
                or "No space left on device" not in text
                or not found
                or damaged(folder)
                or "Traceback" in text
            )
            tally.add(f"full file system: exit code {code}, {text[-400:]}" if wrong else None, code=code)
        finally:
            subprocess.run(["umount", str(mount)], check=False)
    return tally


def _full(stage: Stage, folder: Path, code: int, text: str, whole: list[dict]) -> str | None:
    """Returns what is wrong unless a save failed with its reason and the rerun continues from the one before it."""
    if (
        code != 5
        or "earlier checkpoints are unchanged" not in text
        or "File too large" not in text
        or "Traceback" in text
    ):
        return f"exit code {code}: {text[-400:]}"
    if steps_of(folder) != [2] or damaged(folder):
        return f"checkpoints {steps_of(folder)}, {damaged(folder)}"
    again = stage.train(stage.config(folder, training__steps=STEPS, checkpoint__interval=2))
    if again.wait() != 0 or "resuming after step 2" not in again.text():
        return f"the rerun ended with {again.code}: {again.text()[-300:]}"
    return None if records(folder, "train") == whole else "the curve differs"


def fail_saves(steps: set[int], rank: int, kind: str) -> None:
    """Lets the saves of some steps fail on a rank: a limit on the size of its files, or an error of one operation."""
    storage.PAUSES = (0.01,) * 2
    if int(os.environ.get("RANK", "0")) != rank:
        return
    plain = saving.publish

    def with_limit(folder, at, *arguments, **options):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096 if at in steps else before[0], before[1]))
        try:
            return plain(folder, at, *arguments, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    def failing(act: Callable, number: int) -> Callable:
        def act_or_fail(path, *arguments, **options):
            if any(f".step_{step:08d}.tmp" in str(path) for step in steps):
                raise OSError(number, os.strerror(number))
            return act(path, *arguments, **options)

        return act_or_fail

    if kind == "limit":
        saving.publish = with_limit
    elif kind == "hash":
        publish.file_sha256 = failing(publish.file_sha256, errno.EIO)
    else:
        publish.sync = failing(publish.sync, errno.ENOSPC)


def failing_saves(stage: Stage) -> Tally:
    """Saves fail on one rank and succeed later; or all of them fail."""
    tally, wholes = Tally(), {1: whole_run(stage), 2: whole_run(stage, 2)}
    for number in range(stage.tries(24, 4)):
        folder, ranks = stage.new_folder(), 1 + number % 2
        rank, kind = (number // 2) % ranks, ("limit", "hash", "flush")[number % 3]
        lasts = number % 6 == 5
        failed = {2, 4, 6, 8} if lasts else set(stage.random.sample((2, 4, 6), 1 + number % 3))
        config = stage.config(
            folder, training__steps=STEPS, checkpoint__interval=2, checkpoint__keep=9, checkpoint__weights=True
        )
        config.checkpoint.asynchronous, config.checkpoint.max_failed_saves = (number // 2) % 2 == 1, 1 if lasts else 3
        before = partial(fail_saves, failed, rank, kind)
        children = stage.train_ranks(config, ranks, before=before)
        codes, text = [child.wait() for child in children], children[0].text()
        wanted = sorted({2, 4, 6, 8} - failed)
        told = text.count("could not be saved in") == (2 if lasts else len(failed)) and "Traceback" not in text
        wrong = codes != [5 if lasts else 0] * ranks or steps_of(folder) != wanted or damaged(folder) or not told
        found = records(folder, "train")
        if not wrong and found != wholes[ranks][: len(found)]:
            wrong = "the curve differs"
        tally.add(
            f"{kind} on rank {rank} of {ranks}, steps {sorted(failed)}: exit codes {codes}, checkpoints {steps_of(folder)}, {text[-500:]}"
            if wrong
            else None,
            code=codes[0],
        )
    return tally


def slow_storage(stage: Stage) -> Tally:
    """Every file takes a second to read back, much longer than a step, so that saves overlap with steps and with each other."""

    def slow() -> None:
        read = publish.file_sha256
        publish.file_sha256 = lambda path: time.sleep(1.0) or read(path)

    tally, whole = Tally(), whole_run(stage)
    for number in range(stage.tries(4, 1)):
        folder = stage.new_folder()
        config = stage.config(folder, training__steps=STEPS, checkpoint__interval=1 + number % 2)
        config.checkpoint.asynchronous = True
        child = stage.train(config, before=slow)
        code = child.wait()
        wrong = code or damaged(folder) or records(folder, "train") != whole or "waited" not in child.text()
        tally.add(f"exit code {code}: {child.text()[-300:]}" if wrong else None, code=code)
    return tally


def crashing_writer(stage: Stage) -> Tally:
    """The thread that writes beside training ends with an unexpected error, on one rank or on the only one."""

    def crash(step: int, rank: int) -> None:
        plain = publish.publish

        def publish_or_crash(folder, at, *arguments, **options):
            if at == step and int(os.environ.get("RANK", "0")) == rank:
                raise MemoryError("of the test")
            return plain(folder, at, *arguments, **options)

        saving.publish = publish_or_crash

    tally = Tally()
    for number in range(stage.tries(6, 1)):
        folder, ranks = stage.new_folder(), 1 + number % 2
        config = stage.config(folder, training__steps=2000, checkpoint__interval=4)
        config.checkpoint.asynchronous, config.parallel.timeout_minutes = True, 0.3
        children = stage.train_ranks(config, ranks, before=partial(crash, 8, ranks - 1))
        codes = [child.wait(90) for child in children]
        last = records(folder, "train")[-1]["step"]
        wrong = any(code in (0, -9) for code in codes) or last > 16 or steps_of(folder) != [4] or damaged(folder)
        tally.add(
            f"exit codes {codes}, step {last}, checkpoints {steps_of(folder)}" if wrong else None,
            code=codes[-1],
            lost=last - 4,
        )
    return tally


def second_run(stage: Stage) -> Tally:
    """The same command is started twice at once; and the owner is killed."""
    tally = Tally()
    for _ in range(stage.tries(5, 1)):
        folder = stage.new_folder()
        first = stage.train(stage.config(folder, training__steps=1_000_000))
        first.until(lambda folder=folder: (folder / "metrics.jsonl").exists())
        begin = time.monotonic()
        second = stage.train(stage.config(folder, training__steps=1_000_000))
        code, text = second.wait(), second.text()
        tally.detect.append(time.monotonic() - begin)
        problem = (
            None
            if code == 3 and "is in use by" in text and str(first.pid) in text
            else f"exit code {code}: {text[-300:]}"
        )
        if not first.is_running():
            problem = f"the first run ended with {first.code}"
        first.kill(signal.SIGKILL)
        first.wait()
        third = stage.train(stage.config(folder, training__steps=1_000_000, training__stop_at_step=1))
        if third.wait() != 0:
            problem = problem or f"after the kill: exit code {third.code}, {third.text()[-300:]}"
        tally.add(problem, code=code)
    return tally


def jumping_clock(stage: Stage) -> Tally:
    """The wall clock jumps by an hour, forwards or backwards, during the run."""

    def jump(seconds: float) -> None:
        plain = time.time
        at_step(3, 0, lambda: setattr(time, "time", lambda: plain() + seconds))

    tally, whole = Tally(), whole_run(stage)
    for seconds in (3600.0, -3600.0, 300.0, -300.0, 86400.0 * 365, -86400.0 * 365)[: stage.tries(6, 2)]:
        folder = stage.new_folder()
        child = stage.train(
            stage.config(folder, training__steps=STEPS, checkpoint__interval=2), before=partial(jump, seconds)
        )
        code = child.wait()
        kept = steps_of(folder)
        wrong = code or records(folder, "train") != whole or kept != [6, 8] or "ETA -" in child.text()
        tally.add(f"{seconds:+.0f} s: exit code {code}, checkpoints {kept}" if wrong else None, code=code)
    return tally


def stray_draws(stage: Stage) -> Tally:
    """One of two ranks draws from every global random generator before each step."""

    def draw() -> None:
        import numpy as np
        import torch

        random.random()
        np.random.random()
        torch.rand(3)

    def install() -> None:
        for step in range(STEPS):
            at_step(step, 1, draw)

    tally, plain = Tally(), stage.new_folder()
    assert [c.wait() for c in stage.train_ranks(stage.config(plain, training__steps=STEPS), 2)] == [0, 0]
    for stop in (3, 5, STEPS)[-stage.tries(3, 1) :]:
        folder = stage.new_folder()
        for last in (stop, STEPS):
            config = stage.config(folder, training__steps=STEPS, training__stop_at_step=last)
            codes = [c.wait() for c in stage.train_ranks(config, 2, before=install)]
        same = records(folder, "train") == records(plain, "train")
        tally.add(
            None if same and not any(codes) else f"exit codes {codes}, curve {'same' if same else 'differs'}",
            code=codes[0],
        )
    return tally


def silent_wandb(stage: Stage) -> Tally:
    """The W&B server refuses connections, or accepts them and never answers."""
    tally, whole = Tally(), whole_run(stage)
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        hole.listen(50)
        servers: dict[str, str] = {
            "refuses": "http://127.0.0.1:9",
            "never answers": f"http://127.0.0.1:{hole.getsockname()[1]}",
        }
        for name, address in list(servers.items())[: stage.tries(2, 1)]:
            folder = stage.new_folder()
            config = stage.config(folder, training__steps=STEPS)
            config.logging.wandb.mode = type(config.logging.wandb.mode)("online")
            variables = {
                "WANDB_BASE_URL": address,
                "WANDB_API_KEY": "0" * 40,
                "HOME": str(stage.folder),
                "WANDB_DIR": str(stage.folder),
            }
            child = stage.train(config, rank=variables)
            child.until(lambda folder=folder: (folder / "metrics.jsonl").exists(), 90)
            tally.detect.append(time.monotonic() - child.begin)
            code, seconds = child.wait(120), tally.detect[-1]
            wrong = code or records(folder, "train") != whole or seconds > 15
            tally.add(
                f"{name}: exit code {code}, start after {seconds:.0f} s, {child.text()[-300:]}" if wrong else None,
                code=code,
                lost=0,
            )
    return tally


ROWS = [
    Row(
        "full_disk",
        "no file may grow past a limit, and a file system of 1.5 MB is full, during a save, beside training and not",
        "5, with the reason; the earlier checkpoint stays, and the rerun's curve is bit-identical",
        full_disk,
        must_fail=True,
    ),
    Row(
        "failing_saves",
        "one to three saves of a run fail on one of one or two ranks (no file may grow past a limit, EIO in reading back, ENOSPC in flushing), "
        "beside training and not; or all of them",
        "0: the other saves succeed, and the curve is bit-identical; 5 after checkpoint.max_failed_saves if all fail",
        failing_saves,
    ),
    Row(
        "slow_storage",
        "reading a file back takes 1 s, with saves back to back",
        "the next save waits and reports it; the curve is bit-identical",
        slow_storage,
    ),
    Row(
        "crashing_writer",
        "the thread that writes beside training ends with an unexpected error, on one of one or two ranks",
        "all ranks end, not with 0, within one more interval; the earlier checkpoint stays",
        crashing_writer,
        must_fail=True,
    ),
    Row(
        "second_run",
        "the same run is started twice at once; then its owner is killed",
        "3 for the second, with the owner; after the kill it starts at once",
        second_run,
        must_fail=True,
    ),
    Row(
        "silent_wandb",
        "the W&B server refuses, or never answers",
        "training starts within 15 s and loses no step",
        silent_wandb,
    ),
    Row(
        "jumping_clock",
        "the wall clock jumps by minutes, an hour or a year, both ways",
        "curve, order of checkpoints and ETA do not notice",
        jumping_clock,
    ),
    Row(
        "stray_draws",
        "one of two ranks draws from all global random generators at each step, with a resume",
        "streams, rows and curve do not notice",
        stray_draws,
    ),
]
