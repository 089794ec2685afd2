"""Compares data_prep with its peers on one text: wall and processor seconds, peak memory, MB/s.

    python tests/benchmarks/data_prep text.jsonl work=/tmp/bench                         # this program and the raw tokenizers
    python tests/benchmarks/data_prep text.jsonl work=/tmp/bench peers=/path/to/python megatron=/path/to/Megatron-LM

Each row is a separate process that reads the same JSON lines with the Llama-3 tokenizer. Its start-up is included,
except in the raw rows. They time only the encoder, after it is loaded, which bounds what a program around it can reach.
Memory is the sum of proportional set sizes (PSS) over the process and its children, sampled five times per second. The
rows run one after the other, `rounds` times, and the best of each is shown. So other load on the machine affects all
rows alike.

    work=FOLDER       where outputs go; removed afterwards
    rounds=1
    rows=a,b,c        only these
    processes=2       workers of every row
    peers=PYTHON      an interpreter with datatrove[io,processing] and, for megatron, what Megatron-LM's tool imports
    megatron=FOLDER   a checkout of Megatron-LM; its tools/preprocess_data.py is run from there
"""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil

from data_prep.errors import ConfigurationError, InputError
from data_prep.readers import Piece, is_compressed, read_piece
from data_prep.tokenizer.llama3 import BOS, EOS, llama3_json
from ssa_pretrain.settings.output import pipe_may_close

SAMPLE_SECONDS = 0.2
OPTIONS = ("work", "rounds", "rows", "processes", "peers", "megatron")
RAW = Path(__file__).with_name("raw.py")
DATATROVE = Path(__file__).with_name("datatrove_writer.py")


@dataclass(frozen=True, slots=True)
class Result:
    """One run of one row."""

    wall: float
    cpu: float
    peak_mb: float


def main(arguments: list[str]) -> int:
    """Runs the benchmark and prints a table in Markdown."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 3
    try:
        text, options = Path(arguments[0]).absolute(), settings(arguments[1:])
        size = text_bytes(text) / 1e6
        work = Path(options.get("work", "outputs/bench")).absolute()
        work.mkdir(parents=True, exist_ok=True)
        commands = rows(text, work, options)
        if wanted := options.get("rows"):
            commands = {name: _known(name, commands) for name in wanted.split(",")}
    except (ConfigurationError, InputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return ConfigurationError.exit_code
    best: dict[str, Result] = {}
    for number in range(int(options.get("rounds", "1"))):
        for name, command in commands.items():
            shutil.rmtree(work / "out", ignore_errors=True)
            (work / "out").mkdir()
            result = measure(command, work)
            print(f"round {number + 1}: {name}: {result}", file=sys.stderr, flush=True)
            if name not in best or result.wall < best[name].wall:
                best[name] = result
    shutil.rmtree(work / "out", ignore_errors=True)
    print(table(best, size))
    return 0


def settings(arguments: list[str]) -> dict[str, str]:
    """Returns the options; ConfigurationError for an unknown one or a wrong value."""
    options = {}
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name not in OPTIONS or not value:
            raise ConfigurationError(
                f"{argument} is not an option; the options are {', '.join(f'{o}=' for o in OPTIONS)}"
            )
        options[name] = value
    for name in ("rounds", "processes"):
        if not re.fullmatch("[1-9][0-9]*", options.get(name, "1"), re.ASCII):
            raise ConfigurationError(f"{name}={options[name]} must be a whole number from 1; try {name}=1")
    for name, there in (("peers", shutil.which), ("megatron", os.path.isdir)):
        if name in options and not there(options[name]):
            raise ConfigurationError(f"{name}={options[name]} does not exist; correct the path")
    return options


def text_bytes(path: Path) -> int:
    """Returns the bytes of text in a JSON-lines file; InputError if the file is not one."""
    if not path.is_file():
        raise InputError(f"{path} does not exist; name a file of JSON lines first, then the options")
    if is_compressed(str(path)):
        raise InputError(f"{path} is compressed, which not every row can read; unpack it first")
    size = path.stat().st_size
    return sum(len(raw) for _, raw in read_piece(Piece(str(path), "jsonl", "text", 0, size, size), lambda _: None))


def _known(name: str, commands: dict[str, list[str]]) -> list[str]:
    if name not in commands:
        raise ConfigurationError(f"rows={name} is not a row; the rows are {', '.join(commands)} (peers= adds more)")
    return commands[name]


def rows(text: Path, work: Path, options: dict[str, str]) -> dict[str, list[str]]:
    """Returns the command of each row."""
    processes = options.get("processes", "2")
    tokenizer = llama3_json(None, work / "cache")
    out = work / "out"
    raw = [sys.executable, str(RAW), str(text), str(tokenizer), processes]
    ours = [sys.executable, "-m", "data_prep", "stage=prepare", "source=jsonl", f"source.paths=[{text}]"]
    ours += ["tokenizer=llama3", f"cache={work / 'cache'}", f"out={out / 'data'}", f"workers={processes}"]
    commands = {f"raw {name}": [*raw, name] for name in ("hf", "tiktoken", "gigatoken")}
    commands |= {f"data_prep {name}": [*ours, f"backend={name}"] for name in ("hf", "tiktoken", "gigatoken")}
    if peers := options.get("peers"):
        commands["datatrove"] = [peers, str(DATATROVE), str(text), str(tokenizer), str(out), processes]
        if megatron := options.get("megatron"):
            model = work / "hf"
            model.mkdir(exist_ok=True)
            shutil.copyfile(tokenizer, model / "tokenizer.json")
            names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
            (model / "tokenizer_config.json").write_text(json.dumps(names))
            tool = [
                peers,
                f"{megatron}/tools/preprocess_data.py",
                "--input",
                str(text),
                "--output-prefix",
                str(out / "m"),
            ]
            tool += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(model), "--append-eod"]
            commands["Megatron-LM preprocess_data.py"] = [*tool, "--workers", processes]
    return commands


def measure(command: list[str], work: Path) -> Result:
    """Runs a command and returns its time and memory; a raw row prints its own times.

    Raises:
        RuntimeError: the command failed.
    """
    log = work / "last.log"
    started, before = time.monotonic(), _child_seconds()
    with open(log, "w") as file:
        process = psutil.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=work)
        peak, seconds = 0.0, {}
        while process.poll() is None:
            processes = [process]
            try:
                processes += process.children(recursive=True)
                peak = max(peak, sum(_pss(one) for one in processes))
                seconds |= {one.pid: sum(one.cpu_times()[:2]) for one in processes}
            except psutil.Error:
                pass
            time.sleep(SAMPLE_SECONDS)
    wall = time.monotonic() - started
    # Exact for children that were waited for. Otherwise, if servers start the workers, the sum of the last samples.
    cpu = max(_child_seconds() - before, sum(seconds.values()))
    last = log.read_text().strip().splitlines()[-1:]
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with code {process.returncode}; see {log}")
    if last and last[0].startswith('{"wall"'):
        own = json.loads(last[0])
        return Result(own["wall"], own["cpu"], peak / 1e6)
    return Result(wall, cpu, peak / 1e6)


def _child_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _pss(process: psutil.Process) -> float:
    try:
        return process.memory_full_info().pss
    except psutil.Error:
        return 0.0


def table(best: dict[str, Result], size: float) -> str:
    """Returns the results as a Markdown table."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("tokenizers", "tiktoken", "gigatoken"))
    lines = [
        f"{size:.1f} MB of text; {versions}",
        "",
        "| row | wall s | CPU s | MB/s | peak PSS MB | MB per CPU second |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in best.items():
        lines.append(
            f"| {name} | {result.wall:.1f} | {result.cpu:.1f} | {size / result.wall:.1f} | {result.peak_mb:.0f} | "
            f"{size / max(result.cpu, 0.01):.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    with pipe_may_close():
        sys.exit(main(sys.argv[1:]))
