"""Rows about time: a run of thousands of steps and hundreds of saves keeps its memory, descriptors, threads and log small."""

import ctypes
import gc
import json
import os
import statistics
from pathlib import Path

from faults.rows import Row
from faults.stage import Stage
from faults.tally import Tally
from ssa_pretrain.saving import Saver

STEPS, INTERVAL = 2000, 10
MB_PER_SAVE = 0.1


def sampled(path: Path, every: int) -> None:
    """Appends memory, descriptors and threads of this process to a file every so many steps."""
    after_step = Saver.after_step
    trim = ctypes.CDLL(None).malloc_trim

    def sample(self: Saver, step: int) -> None:
        after_step(self, step)
        if step % every == every - 1:
            gc.collect()
            trim(0)  # what malloc keeps for later is not lost
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            found = [
                step,
                pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
                len(os.listdir("/proc/self/fd")),
                len(os.listdir("/proc/self/task")),
            ]
            with path.open("a") as file:
                file.write(json.dumps(found) + "\n")

    Saver.after_step = sample


def leaks(stage: Stage) -> Tally:
    """Trains and saves for long; the second half must not hold more than the first."""
    tally = Tally()
    steps = stage.tries(STEPS, 200)
    for asynchronous in (True, False)[: stage.tries(2, 1)]:
        folder, samples = stage.new_folder(), stage.new_folder()
        config = stage.config(folder, training__steps=steps, checkpoint__interval=INTERVAL, logging__interval=100)
        config.checkpoint.asynchronous = asynchronous
        shared = len(os.listdir("/dev/shm"))
        child = stage.train(config, before=lambda samples=samples: sampled(samples, INTERVAL))
        code, name = child.wait(1200), "beside training" if asynchronous else "waited for"
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        half, rest = rows[len(rows) // 4 : len(rows) // 2], rows[-len(rows) // 4 :]
        grown = [statistics.median(r[i] for r in rest) - statistics.median(r[i] for r in half) for i in (1, 2, 3)]
        saves = (rest[len(rest) // 2][0] - half[len(half) // 2][0]) / INTERVAL
        tally.figures |= {
            f"MB per save, saves {name}": round(grown[0] / saves, 3),
            f"descriptors and threads more, saves {name}": f"{grown[1]:.0f}, {grown[2]:.0f}",
            f"bytes of log per step, saves {name}": round(len(child.text()) / steps),
        }
        wrong = (
            code
            or grown[0] / saves > MB_PER_SAVE
            or grown[1] > 0
            or grown[2] > 0
            or len(os.listdir("/dev/shm")) > shared + 1
        )
        tally.add(f"saves {name}: exit code {code}, grown by {grown} in {saves} saves" if wrong else None, code=code)
    tally.figures |= {"steps": steps, "saves": steps // INTERVAL}
    return tally


ROWS = [
    Row(
        "leaks",
        "2,000 steps and 200 saves, beside training and waited for",
        "memory, descriptors and threads stay (less than 0.1 MB per save)",
        leaks,
    ),
    Row(
        "soak",
        "an hour of training with a kill every five minutes: kill -9, kill -9 in a save, kill -9 with a flipped bit in the newest checkpoint",
        "every step bit-identical, also those that are trained twice; the goal of 0.95 of the time training is not counted here",
        None,
    ),
]
