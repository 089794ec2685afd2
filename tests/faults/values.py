"""Rows about numbers: gradients, losses and weights that are not finite, loss spikes, and copies of weights that differ between ranks."""

import itertools
import json
from functools import partial
from pathlib import Path

import torch

from faults.rows import Row
from faults.stage import Stage, steps_of
from faults.tally import Tally
from ssa_pretrain import trainer
from support.faulty_training import install, models_of
from support.training import records

STEPS = 6


def digests(path: Path, rank: int = 0) -> list[str]:
    """Returns the digest of the weights after each step."""
    return [json.loads(line)[1] for line in Path(f"{path}.{rank}").read_text().splitlines()]


def bad_steps(stage: Stage) -> Tally:
    """Puts a value that is not finite into one gradient or loss of one rank, in different steps."""
    tally = Tally()
    kinds = [("nan", "nan"), ("nan", "inf"), ("nan", "-inf"), ("loss", "")]
    for number in range(stage.tries(16, 2)):
        (kind, value), rank, ranks = kinds[number % 4], number % 2, 1 + (number // 2) % 2
        steps = sorted(stage.random.sample(range(1, STEPS + 1), 2))
        folder, states = stage.new_folder(), stage.new_folder()
        faults = {
            kind: {"steps": steps, "rank": rank if ranks == 2 else 0, "value": value or "nan"},
            "states": str(states),
        }
        children = stage.train_ranks(
            stage.config(folder, training__steps=STEPS, checkpoint__interval=2, training__max_skipped_steps=9),
            ranks,
            before=partial(install, faults),
        )
        codes = [child.wait() for child in children]
        if any(codes):
            tally.add(f"exit codes {codes}: {children[0].text()[-400:]}", code=codes[0])
            continue
        skipped = [record["step"] for record in records(folder, "train") if record.get("skipped")]
        problem = None if skipped == steps else f"{value or kind} in steps {steps}, skipped {skipped}"
        for one in range(ranks):
            found = digests(states, one)
            unchanged = [step for step, (a, b) in enumerate(itertools.pairwise(found), 2) if a == b]
            if unchanged != [step for step in steps if step > 1]:
                problem = f"in steps {steps} of rank {one} weights stayed in {unchanged}"
        tally.add(problem, code=codes[0], lost=len(skipped) - len(steps))
    return tally


def diverged(stage: Stage) -> Tally:
    """NaN in every step from some step on: the run must end, and the last good checkpoint must stay."""
    tally = Tally()
    for number in range(stage.tries(6, 2)):
        folder, most = stage.new_folder(), number % 3 + 1
        config = stage.config(folder, training__steps=20, checkpoint__interval=1, training__max_skipped_steps=most)
        child = stage.train(config, before=partial(install, {"nan": {"steps": list(range(4, 21))}}))
        code = child.wait()
        wrong = code != 6 or steps_of(folder)[-1] > 3 + most or "training has diverged" not in child.text()
        tally.add(
            f"exit code {code}, checkpoints {steps_of(folder)}: {child.text()[-300:]}" if wrong else None, code=code
        )
    return tally


def bad_weights(stage: Stage) -> Tally:
    """A weight becomes NaN outside of a step: it must not be published."""
    tally = Tally()
    for number in range(stage.tries(8, 2)):
        folder, ranks = stage.new_folder(), 1 + number % 2
        config = stage.config(folder, training__steps=20, checkpoint__interval=1, training__stop_at_step=3)
        config.checkpoint.asynchronous = number % 4 > 1
        faults = {"weights": {"step": 3, "rank": ranks - 1}}
        children = stage.train_ranks(config, ranks, before=partial(install, faults))
        codes = [child.wait() for child in children]
        wrong = codes != [6] * ranks or steps_of(folder)[-1:] != [2] or "is not published" not in children[0].text()
        tally.add(
            f"exit codes {codes}, checkpoints {steps_of(folder)}: {children[0].text()[-300:]}" if wrong else None,
            code=codes[0],
        )
    return tally


def spikes(stage: Stage) -> Tally:
    """A loss three times as large in one step of one stream: it must be named, and nothing else."""
    tally = Tally()
    for number in range(stage.tries(6, 1)):
        folder, stream = stage.new_folder(), ("full", "sparse")[number % 2]
        config = stage.config(folder, training__steps=90, attention__full_ratio=0.5)
        child = stage.train(
            config, before=partial(install, {"spike": {"steps": [80, 81, 82, 83], "factor": 3.0, "stream": stream}})
        )
        code, found = child.wait(), [r for r in records(folder, "train") if "spike" in r]
        wrong = (
            code
            or not found
            or {r["spike"] for r in found} != {stream}
            or not all(80 <= r["step"] <= 83 for r in found)
        )
        tally.add(f"exit code {code}, found {[(r['step'], r['spike']) for r in found]}" if wrong else None, code=code)
        tally.figures["false alarms"] = tally.figures.get("false alarms", 0) + sum(
            not 80 <= r["step"] <= 83 for r in found
        )
    return tally


def flipped_weight(stage: Stage) -> Tally:
    """One bit of one weight of one rank flips before a step."""

    def flip_at(step: int, rank: int) -> None:
        import os

        plain = trainer.train_step

        def train_step(run, done):
            if done == step and run.placement.rank == rank:
                weight = list(models_of(run.engine)[0].parameters())[stage.random.randrange(4)]
                bits = weight.data.view(-1).view(torch.int32)
                bits[os.getpid() % len(bits)] ^= 1 << 22
            return plain(run, done)

        trainer.train_step = train_step

    tally, every = Tally(), 5
    for number in range(stage.tries(10, 1)):
        folder, step = stage.new_folder(), 3 + number
        config = stage.config(
            folder, training__steps=40, checkpoint__interval=4, training__replica_check_interval=every
        )
        config.engine.distributed_optimizer = False
        children = stage.train_ranks(config, 2, before=partial(flip_at, step, number % 2))
        codes = [child.wait() for child in children]
        text = children[0].text()
        wrong = (
            codes != [12, 12]
            or "data ranks hold different weights" not in text
            or any(s > step for s in steps_of(folder))
        )
        found = max((r["step"] for r in records(folder, "train")), default=step) - step
        tally.add(f"exit codes {codes}: {text[-300:]}" if wrong else None, code=codes[0], lost=found)
    tally.figures["steps between comparisons"] = every
    return tally


ROWS = [
    Row(
        "bad_steps",
        "NaN, Inf or -Inf in one gradient, or an infinite loss, on one rank, in any step, the first one too; one and two ranks",
        "exactly these steps are skipped, on all ranks, and weights keep every bit",
        bad_steps,
    ),
    Row(
        "diverged",
        "NaN in every step from one on",
        "6 after training.max_skipped_steps; the last good checkpoint stays",
        diverged,
        must_fail=True,
    ),
    Row(
        "bad_weights",
        "a weight turns NaN outside of a step, before a save",
        "6; it is not published, earlier checkpoints stay",
        bad_weights,
        must_fail=True,
    ),
    Row(
        "spikes",
        "the cross entropy of one stream is three times as large for four steps",
        "named with its stream; no other step is",
        spikes,
    ),
    Row(
        "flipped_weight",
        "one bit of one weight flips on one of two ranks",
        "12, both named, nothing published after it",
        flipped_weight,
        must_fail=True,
    ),
]
