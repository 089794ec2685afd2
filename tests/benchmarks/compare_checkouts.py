"""Shows that two checkouts train alike: every metric but the times is equal to the bit, on a table of tiny CPU trainings.

    python tests/benchmarks/compare_checkouts.py BEFORE AFTER                    # two folders, each a checkout
    python tests/benchmarks/compare_checkouts.py BEFORE AFTER --only ssa cp2     # some cases
    python tests/benchmarks/compare_checkouts.py BEFORE AFTER --data FOLDER      # a dataset that is there already
    python tests/benchmarks/compare_checkouts.py . . --python OTHER/bin/python --only ssa muon resume deepspeed.resume --swap  # versions of libraries

Each case runs the same command lines in both checkouts, with this interpreter's libraries or, for AFTER, those of `--python`, and compares the lines of
metrics.jsonl. With `--swap` what one side has begun the other continues, so that each resumes from the other's checkpoint. Only command lines
are used, so that it works across any refactoring that keeps them. Prints one line per case. Exit code 1 if a value differs or a run fails.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import zip_longest
from pathlib import Path
from typing import Any

TIMES = {"tokens_per_second", "tflops_per_second", "mfu", "seconds", "eta_seconds", "peak_memory_gib"}
SMALL = (
    "experiment=quickstart",
    "model.num_layers=2",
    "data.sequence_length=256",
    "training.steps=6",
    "training.global_batch_tokens=2048",
    "training.micro_batch_size=2",
    "evaluation.rows=4",
    "evaluation.interval=3",
    "checkpoint.interval=3",
)
ENGINES = {"": [], "deepspeed.": ["engine=deepspeed", "deepspeed.zero_stage=2"]}
METHODS = ("ssa", "full", "moba")
Side = tuple[Path, str]  # a checkout and the interpreter that runs it
# Name: processes, and the overrides of each command in turn; a second command continues the run of the first.
CASES: dict[str, tuple[int, list[list[str]]]] = {
    **{f"{prefix}{m}": (1, [[*own, f"attention={m}"]]) for prefix, own in ENGINES.items() for m in METHODS},
    "muon": (2, [["optim=muon"]]),
    "counterpart_share": (1, [["attention.counterpart_share=0.5"]]),
    "resume": (1, [["training.stop_at_step=3"], []]),
    "muon.resume": (2, [["optim=muon", "training.stop_at_step=3"], ["optim=muon"]]),
    "deepspeed.resume": (2, [[*ENGINES["deepspeed."], "training.stop_at_step=3"], ENGINES["deepspeed."]]),
    "cp2": (2, [["parallel=cp2"]]),
    "tp2_pp2": (4, [["parallel=tp2_pp2"]]),
}


def main() -> int:
    """Runs the cases and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--data", type=Path, help="a prepared dataset; without it BEFORE prepares the quickstart's")
    parser.add_argument("--python", default=sys.executable, help="the interpreter of AFTER; without it this one")
    parser.add_argument("--swap", action="store_true", help="each side continues what the other has begun")
    arguments = parser.parse_args()
    before, after = (arguments.before, sys.executable), (arguments.after, arguments.python)
    differing = []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        data = (arguments.data or prepare(before, scratch / "data")).resolve()
        for case in arguments.only:
            found = [
                train(sides if arguments.swap else sides[:1] * 2, case, data, scratch / case / name)
                for name, sides in (("before", (before, after)), ("after", (after, before)))
            ]
            outcome = compare(*found)
            print(f"{case:20} {outcome or f'equal: {len(found[0])} records, {count(found[0])} values'}", flush=True)
            differing += [case] if outcome else []
    return int(bool(differing))


def prepare(side: Side, out: Path) -> Path:
    """Returns the folder of a dataset that a side has prepared."""
    run(side, ["-m", "data_prep", "source=quickstart", "tokenizer=bpe4k", f"out={out}"])
    return out


def train(sides: tuple[Side, ...], case: str, data: Path, out: Path) -> list[dict[str, Any]]:
    """Returns the records of a case's run, without times. The first side runs the first command, the second side another."""
    processes, commands = CASES[case]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    for side, overrides in zip(sides, commands, strict=False):
        run(
            side,
            [*launcher, "-m", "ssa_pretrain.train", *SMALL, *overrides, f"data.path={data}", f"output_dir={out}"],
        )
    lines = (out / "metrics.jsonl").read_text().splitlines()
    found = [record for record in map(json.loads, lines) if record["kind"] != "checkpoint"]  # has only times
    return [{key: value for key, value in record.items() if key not in TIMES} for record in found]


def run(side: Side, arguments: list[str]) -> None:
    """Runs a side's Python in its checkout; ends this program with the output if that fails."""
    checkout, python = side
    root = checkout.resolve()
    path = os.pathsep.join([str(root), str(root / "kernels")])
    own = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [python, *arguments], cwd=root, env=os.environ | own, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(
            f"{checkout}: exit code {done.returncode} of {' '.join(arguments)}\n{done.stdout}{done.stderr[-4000:]}"
        )


def compare(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> str:
    """Returns the first difference between two lists of records; empty if there is none."""
    for one, other in zip_longest(before, after, fillvalue={}):
        for key in one | other:
            if key not in one or key not in other or one[key] != other[key]:
                place = f"{(one or other)['kind']} record of step {(one or other)['step']}"
                return f"DIFFERS: {place}: {key} is {one.get(key, 'absent')} before, {other.get(key, 'absent')} after"
    return ""


def count(records: list[dict[str, Any]]) -> int:
    """Returns the number of values compared, those of lists counted each."""
    return sum(len(value) if isinstance(value, list) else 1 for record in records for value in record.values())


if __name__ == "__main__":
    sys.exit(main())
