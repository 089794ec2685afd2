"""Rows about publishing a checkpoint: kills at every system call and at random moments, torn writes, lost flushes, errors of the storage."""

import errno
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from faults.rows import Row
from faults.stage import Child, Stage, damaged, steps_of
from faults.syscalls import Call, report_changes, trace
from faults.tally import Tally
from ssa_pretrain import saving
from ssa_pretrain.checkpoint import publish, storage
from support.training import records

SAVED = 3  # the step whose save is killed; checkpoints of steps 1 and 2 are there, and a leftover of an earlier kill


def prepared(stage: Stage) -> tuple[Path, list[dict]]:
    """Returns a run with checkpoints of steps 1 and 2 and an unfinished folder of step 3, and the records of the run without a fault up to step 4."""
    folder = stage.new_folder()
    assert stage.train(stage.config(folder, checkpoint__interval=1, training__stop_at_step=4)).wait() == 0
    whole = records(folder, "train")
    shutil.rmtree(folder)
    assert stage.train(stage.config(folder, checkpoint__interval=1, training__stop_at_step=2)).wait() == 0
    shutil.copytree(folder / "checkpoints/step_00000002", folder / "checkpoints/.step_00000003.tmp")
    return folder, whole


def publish_traced() -> None:
    """Lets the tracer see the calls of publishing, in whichever thread it runs."""
    plain = publish.publish

    def traced(*arguments, **options):
        report_changes()
        return plain(*arguments, **options)

    saving.publish = traced


def require_resumes(stage: Stage, folder: Path, whole: list[dict], tally: Tally) -> str | None:
    """Runs the same command to step 4; returns what is not as in the run without a fault."""
    begin = time.monotonic()
    child = stage.train(stage.config(folder, checkpoint__interval=1, training__stop_at_step=4))
    if child.wait() != 0:
        return f"the rerun ended with {child.code}: {child.text()[-300:]}"
    tally.recover.append(time.monotonic() - begin)
    return None if records(folder, "train") == whole else "the rerun's curve differs"


def kill_at_every_call(stage: Stage, *, asynchronous: bool) -> Tally:
    """Kills the process before every call of a save that changes a file."""
    tally, (template, whole) = Tally(), prepared(stage)
    folder, num_calls = stage.new_folder(), 0
    while _killed_at(stage, (template, folder), num_calls, whole, tally, asynchronous=asynchronous):
        num_calls += max(1, round(1 / stage.scale))  # a smaller matrix takes every so many calls
    tally.figures["system calls"] = num_calls
    return tally


def _killed_at(
    stage: Stage, folders: tuple[Path, Path], place: int, whole: list[dict], tally: Tally, *, asynchronous: bool
) -> bool:
    """Saves step 3 in a copy of the prepared run and kills the process at one call; returns False if the save had fewer calls."""
    template, folder = folders
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder)
    seen: list[Call] = []
    config = stage.config(folder, checkpoint__interval=1, training__stop_at_step=SAVED + asynchronous)
    config.checkpoint.asynchronous = asynchronous
    child = stage.train(config, before=publish_traced, stopped=True)
    code = trace(child.pid, lambda call: seen.append(call) or len(seen) == place + 1, folder / "checkpoints")
    if code == 0:
        return False
    found, wrong = steps_of(folder), damaged(folder)
    if len(found) - len(wrong) < 2:
        wrong.append(f"only {found} are left")
    problem = "; ".join(wrong) or require_resumes(stage, folder, whole, tally)
    call = seen[min(place, len(seen) - 1)]
    where = f"at {call.name} of {call.path.removeprefix(str(folder))}"
    tally.add(f"{where}: {problem}" if problem else None, code=code, lost=max(0, SAVED - 1 - max(found, default=0)))
    return True


def torn_writes(stage: Stage) -> Tally:
    """Kills the process in the middle of every write of a save: half of its bytes are there."""
    tally, (template, whole) = Tally(), prepared(stage)
    folder = stage.new_folder()
    writes, number = 1, 0
    while number < writes:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(template, folder)
        seen: list[Call] = []

        def at_call(call: Call, number: int = number, seen: list[Call] = seen) -> bool:
            if call.name == "write" and call.arguments[2] > 1:
                seen.append(call)
                return len(seen) == number + 1 and call.do_half()
            return False

        config = stage.config(folder, checkpoint__interval=1, training__stop_at_step=SAVED)
        code = trace(stage.train(config, before=publish_traced, stopped=True).pid, at_call, folder / "checkpoints")
        if code == 0:
            break
        writes = len(seen) + 1
        lost = max(0, SAVED - 1 - max(steps_of(folder), default=0))
        problem = "; ".join(damaged(folder)) or require_resumes(stage, folder, whole, tally)
        tally.add(f"in write {number} of {seen[-1].path}: {problem}" if problem else None, code=code, lost=lost)
        number += max(1, round(1 / stage.scale))
    tally.figures["writes of one save"] = writes - 1
    return tally


def flushed_before_rename(stage: Stage) -> Tally:
    """Judges from the calls of a save what a power failure can leave: a published name must not lead to bytes that were not flushed."""
    tally = Tally()
    for asynchronous in (False, True):
        folder = stage.new_folder()
        calls: list[Call] = []
        config = stage.config(folder, checkpoint__interval=2, training__stop_at_step=4, checkpoint__weights=True)
        config.checkpoint.asynchronous = asynchronous
        child = stage.train(config, before=publish_traced, stopped=True)
        code = trace(child.pid, lambda call, calls=calls: bool(calls.append(call)), folder / "checkpoints")
        tally.add(_unflushed(calls, folder) if code == 0 else child.text()[-300:], code=code)
    return tally


def _unflushed(calls: list[Call], folder: Path) -> str | None:
    """Returns the first file that is published before its last write, or its name, is flushed."""
    dirty: set[str] = set()
    renamed: list[str] = []
    for call in calls:
        parent = os.path.dirname(call.path)
        if call.name in ("fsync", "fdatasync"):
            dirty.discard(call.path)
            renamed = [name for name in renamed if name != call.path]
        elif call.name.startswith("rename"):
            left = [path for path in dirty if path.startswith(call.path)]
            if left and "/.step_" in call.path and "/.step_" not in call.target:
                return f"{left[0]} is not flushed when its folder is published"
            dirty = {path.replace(call.path, call.target, 1) if path.startswith(call.path) else path for path in dirty}
            renamed.append(os.path.dirname(call.target))
        elif call.name not in ("unlink", "unlinkat", "rmdir"):
            dirty |= (
                {call.path}
                if call.name in ("write", "writev", "pwrite64")
                else {call.path, parent}
                if "open" in call.name
                else set()
            )
    renamed = [path for path in renamed if path == f"{folder}/checkpoints"]
    return f"{renamed[0]} is not flushed after a rename" if renamed else None


def random_kills(stage: Stage, *, full: int = 500) -> Tally:
    """Kills one run again and again at random moments of its saves, beside training and not; its curve must be that of a run without a fault."""
    tally, folder = Tally(), stage.new_folder()
    tries = stage.tries(full, 6)
    for number in range(tries):
        config = stage.config(folder, checkpoint__interval=1, training__steps=100_000)
        config.checkpoint.asynchronous = number % 2 == 1
        step = max(steps_of(folder), default=0) + 1 + stage.random.randrange(2)
        child = stage.train(config)
        begun = partial((folder / "checkpoints").glob, f".step_{step:08d}.tmp")  # its save has begun, or is over
        seen = child.until(lambda step=step, begun=begun: any(begun()) or max(steps_of(folder), default=0) >= step)
        time.sleep(stage.random.uniform(0.0, 0.15))
        child.kill()
        code = child.wait()
        tally.add(_after_kill(folder, child, seen=seen), code=code, lost=0)
    last = max(steps_of(folder))
    whole = stage.new_folder()
    assert stage.train(stage.config(whole, training__steps=100_000, training__stop_at_step=last)).wait(600) == 0
    if stage.train(stage.config(folder, training__steps=100_000, training__stop_at_step=last)).wait() != 0:
        tally.failures.append("the last rerun failed")
    same = records(whole, "train") == [r for r in records(folder, "train") if r["step"] <= last]
    tally.figures |= {"steps of the curve": last, "curve bit-identical": same}
    tally.good = tally.good if same else 0
    return tally


def _after_kill(folder: Path, child: Child, *, seen: bool) -> str | None:
    """Returns what is wrong after a kill: a save that was reported must be there, and nothing that is there may be damaged."""
    text, found = child.text(), steps_of(folder)
    reported = [int(line.split()[2].rstrip(":")) for line in text.splitlines() if line.startswith("saved step ")]
    if not seen:
        return f"no save was seen: {text[-300:]}"
    if wrong := damaged(folder):
        return "; ".join(wrong)
    if reported and (not found or max(found) < reported[-1]):
        return f"step {reported[-1]} was reported as saved, and {found} are there"
    return None


def storage_errors(stage: Stage) -> Tally:
    """Calls of a save fail a few times with an error that passes, or for ever."""
    tally, (template, whole) = Tally(), prepared(stage)
    passing = [
        ("mkdir", errno.ESTALE),
        ("rename", errno.ESTALE),
        ("rename", errno.EIO),
        ("write", errno.EIO),
        ("read", errno.ETIMEDOUT),
    ]
    lasting = [
        ("rename", errno.EIO),
        ("write", errno.ENOSPC),
        ("mkdir", errno.EACCES),
        ("fsync", errno.EIO),
        ("write", errno.EDQUOT),
        ("rename", errno.EROFS),
    ]
    for name, number in passing:
        tally.add(_with_error(stage, template, whole, tally, name, number, times=2))
    for name, number in lasting:
        tally.add(_with_error(stage, template, whole, tally, name, number, times=1000))
    return tally


def _with_error(
    stage: Stage, template: Path, whole: list[dict], tally: Tally, name: str, number: int, times: int
) -> str | None:
    """Saves step 3 while an operation fails; returns what is not as expected."""
    folder = stage.new_folder()
    shutil.copytree(template, folder)

    def install() -> None:
        storage.PAUSES = (0.01,) * 5
        left = [times]

        def failing(plain: Callable) -> Callable:
            def act(*arguments, **options):
                if left[0] > 0 and any(".step_" in str(a) for a in arguments):
                    left[0] -= 1
                    raise OSError(number, os.strerror(number))
                return plain(*arguments, **options)

            return act

        owner, attribute = {
            "mkdir": (Path, "mkdir"),
            "rename": (os, "rename"),
            "write": (Path, "write_text"),
            "read": (publish, "file_sha256"),
            "fsync": (publish, "sync"),
        }[name]
        setattr(owner, attribute, failing(getattr(owner, attribute)))

    child = stage.train(stage.config(folder, checkpoint__interval=1, training__stop_at_step=SAVED), before=install)
    begin, code, text = time.monotonic(), child.wait(), child.text()
    tally.codes[code] += 1
    what = f"{errno.errorcode[number]} of {name}, {times} times"
    if wrong := damaged(folder):
        return f"{what}: {wrong}"
    if times < 10:
        if code != 0 or (name != "write" and "trying again" not in text):
            return f"{what}: exit code {code}, {text[-300:]}"
        return require_resumes(stage, folder, whole, tally)
    tally.detect.append(time.monotonic() - begin)
    named = "earlier checkpoints are unchanged" in text and os.strerror(number) in text
    if code != 5 or not named or steps_of(folder) != [1, 2]:
        return f"{what}: exit code {code}, checkpoints {steps_of(folder)}, {text[-400:]}"
    return require_resumes(stage, folder, whole, tally)


ROWS = [
    Row(
        "kill_every_syscall",
        "kill -9 before every system call of a save that changes a file, removal of old checkpoints included; a leftover of an earlier kill is there",
        "two intact checkpoints at any time, none damaged; the rerun's curve is bit-identical",
        partial(kill_at_every_call, asynchronous=False),
        must_fail=True,
    ),
    Row(
        "kill_every_syscall_async",
        "the same while a save runs beside training, and in the one after it",
        "the same",
        partial(kill_at_every_call, asynchronous=True),
        must_fail=True,
    ),
    Row("torn_writes", "kill -9 in the middle of every write of a save", "the same", torn_writes, must_fail=True),
    Row(
        "power_failure",
        "power failure at any moment of a save, judged from the order of its writes and flushes",
        "no name is published before the bytes behind it are flushed",
        flushed_before_rename,
    ),
    Row(
        "random_kills",
        "kill -9 at random moments of the saves of one run, half of them beside training; the same command continues each time",
        "no checkpoint is damaged, none that was reported is missing; the curve is bit-identical",
        random_kills,
        must_fail=True,
    ),
    Row(
        "storage_errors",
        "EIO, ESTALE, ETIMEDOUT that pass; EIO, ENOSPC, EDQUOT, EACCES, EROFS that stay; in creating, writing, reading back, flushing, renaming",
        "those that pass are tried again; those that stay end the run with 5 and the reason, and checkpoints stay as they are",
        storage_errors,
    ),
]
