"""The command line of the benchmark: key=value options, checked without importing torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from ssa_pretrain.config import CONF, Config, ModelConfig, ParallelConfig, PrecisionName
from ssa_pretrain.errors import UsageError
from ssa_pretrain.planning.memory import count_parameters

MODELS = CONF / "model"
ONE_PROCESS = (
    "8k",
    "32k",
    "share",
    "share_8k",
    "share_32k",
    "share_128k",
    "methods",
    "optimizer",
    "fp8",
    "recompute",
    "indexer",
    "keys",
)
SHORTHANDS = {"share": ("share_8k", "share_32k")}
LENGTHS = {"32k": 4, "share_32k": 4, "share_128k": 16}  # how many times `length` the rows of a case are long
TWO_PROCESSES = ("dp2", "tp2", "tp2_overlap")
DEFAULT_VOCAB = 4096  # for models whose vocabulary is the tokenizer's
CPU_PARAMETERS = 50_000_000
CPU_TOKENS = 4096  # per microbatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of the command line; __main__ explains them."""

    cases: tuple[str, ...]
    model: str = "llama_1b"
    length: int = 8192
    rows: int = 2
    rounds: int = 4
    runs: int = 3
    parts: int = 0
    precision: str = "bf16"
    out: str = "outputs/bench"


def read_options(arguments: Sequence[str], world_size: int) -> Options:
    """Returns the options of a command line; raises UsageError if an option is wrong."""
    given: dict[str, Any] = {}
    for argument in arguments:
        key, sign, value = argument.partition("=")
        if not sign or key not in Options.__slots__:
            raise UsageError(
                f"{argument!r} is not an option; the options are {', '.join(f'{name}=' for name in Options.__slots__)}"
            )
        given[key] = value
    known = TWO_PROCESSES if world_size == 2 else ONE_PROCESS
    usual = ",".join(case for case in known if case != "methods")
    cases = tuple(given.pop("cases", usual).split(","))
    if wrong := [case for case in cases if case not in known]:
        hint = f"{', '.join(TWO_PROCESSES)} need torchrun --nproc-per-node 2, the others one process"
        raise UsageError(
            f"cases={','.join(wrong)} must be among {', '.join(known)} with {world_size} process(es); {hint}"
        )
    cases = tuple(dict.fromkeys(part for case in cases for part in SHORTHANDS.get(case, (case,))))
    numbers: dict[str, int] = {}
    for name in ("length", "rows", "rounds", "runs", "parts"):
        text = given.pop(name, str(Options.__dataclass_fields__[name].default))
        if name == "parts" and text not in ("0", "1"):
            raise UsageError(f"parts={text} must be 0 or 1")
        if not text.isdigit() or (int(text) < 1 and name != "parts"):
            raise UsageError(f"{name}={text} must be a positive whole number")
        numbers[name] = int(text)
    options = Options(cases=cases, **numbers, **given)
    if not (MODELS / f"{options.model}.yaml").is_file():
        names = sorted(path.stem for path in MODELS.glob("*.yaml"))
        raise UsageError(f"model={options.model} is not a file in conf/model; try {', '.join(names)}")
    if options.precision not in ("bf16", "fp32"):
        raise UsageError(f"precision={options.precision} must be bf16 or fp32; for FP8 use cases=fp8")
    return options


def require_small(options: Options) -> None:
    """Raises UsageError if a case is too large for a CPU."""
    config = bench_config(options)
    count, _ = count_parameters(config, config.model.padded_vocab_size(config.model.vocab_size or DEFAULT_VOCAB))
    longest = max(LENGTHS.get(case, 1) for case in options.cases)
    tokens = options.length * max(options.rows, longest)
    if count > CPU_PARAMETERS or tokens > CPU_TOKENS:
        raise UsageError(
            f"model={options.model} ({count / 1e6:,.0f} million parameters) with {tokens:,} tokens needs a GPU, and torch sees none; "
            "for a small case on the CPU try cases=8k model=tiny length=256 rows=1 precision=fp32"
        )


def bench_config(
    options: Options, *, parallel: Mapping[str, Any] | None = None, engine: Mapping[str, Any] | None = None
) -> Config:
    """Returns the configuration to build engines from, with the given settings of the groups `parallel` and `engine`."""
    model = ModelConfig(**yaml.safe_load((MODELS / f"{options.model}.yaml").read_text(encoding="utf-8")))
    config = Config(name="bench", model=model, parallel=ParallelConfig(**(parallel or {})))
    return replace(
        config,
        engine=replace(config.engine, **(engine or {})),
        data=replace(config.data, sequence_length=options.length),
        training=replace(config.training, micro_batch_size=options.rows),
        precision=replace(config.precision, name=PrecisionName(options.precision)),
    )
