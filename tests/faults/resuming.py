"""Rows about resuming: on another layout, with a changed configuration, with files of the run's folder missing."""

import itertools
import shutil
from pathlib import Path
from typing import Any

from faults.rows import Row
from faults.stage import Stage
from faults.tally import Tally
from support.training import records

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "dp 2": (2, {}),
    "tp 2": (2, {"parallel__tp": 2}),
    "tp 2, sequence parallel": (2, {"parallel__tp": 2, "parallel__sequence_parallel": True}),
    "pp 2": (2, {"parallel__pp": 2}),
    "cp 2": (2, {"parallel__cp": 2}),
}
STOP, LAST = 2, 4
LIMIT = 1e-5


def run_on(stage: Stage, layout: str, folder: Path, stop: int) -> str | None:
    """Trains to a step on a layout; returns what is wrong."""
    ranks, changes = LAYOUTS[layout]
    config = stage.config(folder, training__steps=LAST, training__stop_at_step=stop, **changes)
    children = stage.train_ranks(config, ranks)
    codes = [child.wait() for child in children]
    return None if not any(codes) else f"{layout}: exit codes {codes}, {children[0].text()[-400:]}"


def layouts(stage: Stage) -> Tally:
    """Saves on each layout and resumes on each."""
    tally, names = Tally(), list(LAYOUTS)[: stage.tries(len(LAYOUTS), 2)]
    whole = stage.new_folder()
    assert run_on(stage, "one process", whole, LAST) is None
    expected, worst = records(whole, "train"), 0.0
    saved = {}
    for name in names:
        saved[name] = stage.new_folder()
        if problem := run_on(stage, name, saved[name], STOP):
            tally.failures.append(problem)
    for source, target in itertools.product(names, names):
        folder = stage.new_folder()
        shutil.copytree(saved[source], folder)
        problem = run_on(stage, target, folder, LAST)
        if problem is None:
            found = records(folder, "train")
            pairs = [
                (a[key], b[key])
                for a, b in zip(found, expected, strict=True)
                for key in ("loss", "cross_entropy", "captured_mass")
            ]
            distance = max(abs(a - b) / max(abs(b), 1e-12) for a, b in pairs)
            worst = max(worst, distance)
            problem = f"{source} to {target}: {distance:.1e}" if distance > LIMIT else None
        tally.add(problem, code=0 if problem is None else 1, lost=0)
    tally.figures |= {"layouts": len(names), "largest relative difference of a loss": float(f"{worst:.1e}")}
    return tally


def wrong_settings(stage: Stage) -> Tally:
    """Resumes with settings that decide the losses, and with settings that may change."""
    tally, original = Tally(), stage.new_folder()
    assert stage.train(stage.config(original, training__steps=20, training__stop_at_step=2)).wait() == 0
    refused = {
        "seed": 7,
        "attention.top_k": 1,
        "attention.block_size": 32,
        "attention.full_ratio": 0.25,
        "attention.alignment_weight": 5.0,
        "data.sequence_length": 128,
        "training.global_batch_tokens": 256,
        "model.num_layers": 3,
        "model.hidden_size": 64,
        "model.rope_theta": 20000.0,
        "optim.beta2": 0.9,
        "optim.weight_decay": 0.5,
    }
    allowed = {
        "optim.lr": 1e-4,
        "training.steps": 30,
        "evaluation.interval": 1,
        "checkpoint.interval": 1,
        "logging.interval": 5,
        "checkpoint.keep": 5,
    }
    for name, value in list((refused | allowed).items())[:: max(1, round(1 / stage.scale))]:
        folder = stage.new_folder()
        shutil.copytree(original, folder)
        changes = {"training__steps": 20, "training__stop_at_step": 3, name.replace(".", "__"): value}
        child = stage.train(stage.config(folder, **changes))
        code, text = child.wait(), child.text()
        if name in allowed:
            wrong = code != 0 or "resuming after step 2" not in text
        else:
            wrong = code != 5 or f"{name}: checkpoint " not in text or "Traceback" in text
        tally.add(f"{name}={value}: exit code {code}, {text[-300:]}" if wrong else None, code=code)
    return tally


def missing_files(stage: Stage) -> Tally:
    """Removes or damages files of the run's folder other than checkpoints."""
    tally, original, whole = Tally(), stage.new_folder(), stage.new_folder()
    assert stage.train(stage.config(original, training__steps=20, training__stop_at_step=2)).wait() == 0
    assert stage.train(stage.config(whole, training__steps=20, training__stop_at_step=4)).wait() == 0
    ways = {
        "no config.yaml": lambda f: (f / "config.yaml").unlink(),
        "no environment.jsonl": lambda f: (f / "environment.jsonl").unlink(),
        "half a line in environment.jsonl": lambda f: (f / "environment.jsonl").write_text('{"step": 0, "sta'),
        "half a line in metrics.jsonl": lambda f: (f / "metrics.jsonl").open("a").write('{"kind": "train", "st'),
        "zeros in metrics.jsonl": lambda f: (f / "metrics.jsonl").open("ab").write(bytes(512)),
        "no lock": lambda f: (f / ".lock").unlink(),
        "another process in the lock": lambda f: (f / ".lock").write_text("pid 1 on nowhere"),
    }
    for name, damage in ways.items():
        folder = stage.new_folder()
        shutil.copytree(original, folder)
        damage(folder)
        child = stage.train(stage.config(folder, training__steps=20, training__stop_at_step=4))
        code = child.wait()
        same = code == 0 and records(folder, "train") == records(whole, "train")
        tally.add(None if same else f"{name}: exit code {code}, {child.text()[-300:]}", code=code, lost=0)
    return tally


ROWS = [
    Row(
        "layouts",
        "saved on one layout and resumed on another: every pair of one process, dp 2, tp 2, tp 2 with sequence parallelism, pp 2, cp 2",
        "the losses are those of one process, to 1e-5",
        layouts,
    ),
    Row(
        "wrong_settings",
        "resumed with another seed, shape, batch, optimizer; and with what may change",
        "the first are refused (5) by name, the others continue",
        wrong_settings,
    ),
    Row(
        "missing_files",
        "config, environment, lock missing or damaged; metrics cut off within a line",
        "the run continues; the curve is bit-identical",
        missing_files,
    ),
]
