"""What is measured: layouts of the 1B model with their settings, and which of them a host of some GPUs runs.

*Weak scaling*: every GPU has the same number of tokens per step, so a pipeline of p stages has p times as many microbatches. *Strong scaling* and
the losses: a fixed global batch, the same rows for every layout. The numbers of microbatches are powers of two, for which half of a step's
microbatches have the full main stream (schedule.py), so that no layout profits from its draw.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ssa_pretrain.cli import resolve_config
from ssa_pretrain.config import Config
from ssa_pretrain.config.machine import Machine

ONE_GPU, OTHER_GPU = "one GPU", "the other GPU"
SSA, FULL, QUARTER = "ssa", "full", "ssa r=1/4"
VARIANTS: dict[str, dict[str, Any]] = {SSA: {}, FULL: {"method": "full"}, QUARTER: {"counterpart_share": 0.25}}
TP2 = ("parallel.tp=2", "parallel.sequence_parallel=true")
SHORT_LAST_STAGE = "parallel.layers_on_last_stage={last_stage}"  # its output layer takes as long as three layers
PP2, VPP2 = ("parallel.pp=2",), ("parallel.pp=2", "parallel.vpp=2")
OVERLAPPED = ("grad_reduce", "param_gather")


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The model and its batches.

    Attributes:
        settings: of every case, after the experiment's.
        lengths: tokens per row, by name.
        rows: rows per microbatch, by name of the length.
        tokens_per_gpu: per step, in weak scaling.
        last_stage: layers of the last of two pipeline stages, where they are not split evenly.
    """

    settings: tuple[str, ...]
    lengths: dict[str, int]
    rows: dict[str, int]
    tokens_per_gpu: int
    last_stage: int = 7


SIZES = {
    "1b": Size(
        settings=("experiment=ssa_1b_8k",),
        lengths={"8k": 8192, "32k": 32768},
        rows={"8k": 2, "32k": 1},
        tokens_per_gpu=131_072,
    ),
    # Half of the tokens: for a host of two GPUs, whose pipelines are short.
    "1b_half": Size(
        settings=("experiment=ssa_1b_8k",),
        lengths={"8k": 8192, "32k": 32768},
        rows={"8k": 2, "32k": 1},
        tokens_per_gpu=65_536,
    ),
    # The same programs in seconds on CPUs. Its rows have the names of the long ones.
    "toy": Size(
        settings=(
            "experiment=ssa_1b_8k",
            "model=tiny",
            "model.vocab_size=512",
            "attention.top_k=2",
            "attention.impl=reference",
            "precision=fp32",
        ),
        lengths={"8k": 64, "32k": 128},
        rows={"8k": 2, "32k": 1},
        tokens_per_gpu=256,
        last_stage=1,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One layout at one length of rows.

    Attributes:
        layout: its name in the tables, such as "tp2 pp2 dp2".
        length: name of the rows' length, "8k" or "32k".
        gpus: processes.
        settings: of the layout.
        variants: names in VARIANTS; the first is the one whose losses are compared.
        exposed: variants whose communication is measured.
        rounds: timed steps of each variant.
        kind: "speed", or "save" for an asynchronous checkpoint.
        then: for "save", the settings of the layout that resumes.
        rows: per microbatch; 0: the size's. Another number draws other streams, so losses are not compared.
    """

    layout: str
    length: str
    gpus: int
    settings: tuple[str, ...] = ()
    variants: tuple[str, ...] = (SSA,)
    exposed: tuple[str, ...] = ()
    rounds: int = 2
    kind: str = "speed"
    then: tuple[str, ...] = ()
    rows: int = 0

    @property
    def name(self) -> str:
        """Its name, different from every other case's of a host."""
        return f"{self.layout}, {self.length}" + (", saved" if self.kind == "save" else "")

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON takes it."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> "Case":
        """Returns the case of `to_json`, read from a file."""
        return Case(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Cases that one set of processes measures one after another."""

    gpus: int
    cases: list[Case] = field(default_factory=list)


def fixed_rows(length: str, host_gpus: int) -> int:
    """Returns the rows of the fixed global batch: at least one microbatch for every data rank of the host."""
    return max(8, 2 * host_gpus) if length == "8k" else host_gpus


def two_gpus() -> dict[str, list[Job]]:
    """Returns the jobs by part for a host of two GPUs."""
    every = (SSA, QUARTER, FULL)
    dp2 = Case(layout="dp2", length="8k", gpus=2, variants=every, exposed=(SSA, QUARTER), rounds=6)
    tp2 = Case(layout="tp2", length="8k", gpus=2, settings=TP2, variants=(SSA, QUARTER), exposed=(SSA, QUARTER))
    overlapped = Case(
        layout="tp2 overlapped",
        length="8k",
        gpus=2,
        settings=(*TP2, "engine.overlap_tp=true"),
        variants=(SSA, QUARTER),
        exposed=(SSA,),
        rounds=4,
    )
    long_tp2 = Case(layout="tp2", length="32k", gpus=2, settings=TP2)
    cp2 = Case(
        layout="cp2",
        length="32k",
        gpus=2,
        settings=("parallel.cp=2",),
        variants=every,
        exposed=(SSA, QUARTER),
        rounds=3,
    )
    long_dp2 = Case(layout="dp2", length="32k", gpus=2)
    fp8_cp2 = Case(layout="cp2 fp8", length="32k", gpus=2, settings=(*cp2.settings, "precision=fp8"))
    pp2 = Case(layout="pp2", length="8k", gpus=2, settings=PP2)
    vpp2 = Case(layout="pp2 vpp2", length="8k", gpus=2, settings=VPP2, exposed=(SSA,))
    zero = [
        Case(
            layout=f"dp2 zero{stage}",
            length="8k",
            gpus=2,
            settings=("engine=deepspeed", f"deepspeed.zero_stage={stage}"),
        )
        for stage in (1, 2, 3)
    ]
    base = Case(layout=ONE_GPU, length="8k", gpus=1, variants=(SSA, QUARTER), rounds=4)
    # Longer microbatches: their products hide more of the communication, and the host launches half as much per token.
    larger = [replace(case, layout=f"{case.layout}, 4 rows", rows=4, exposed=()) for case in (base, tp2, overlapped)]
    plain = Case(layout="dp2", length="8k", gpus=2)
    save = Case(layout="dp2", length="8k", gpus=2, kind="save", then=TP2)
    return {
        "speed": [
            *both_gpus_alone(every),
            Job(gpus=2, cases=[dp2, tp2, cp2, vpp2, overlapped, long_tp2, long_dp2, pp2, fp8_cp2]),
        ],
        "rows": [Job(gpus=1, cases=[base]), Job(gpus=1, cases=larger[:1]), Job(gpus=2, cases=larger[1:])],
        "save": [Job(gpus=2, cases=[save])],
        # Each in processes of its own: DeepSpeed keeps an engine's memory after it.
        "deepspeed": [Job(gpus=2, cases=[case]) for case in (plain, *zero)],
    }


def both_gpus_alone(variants: tuple[str, ...]) -> list[Job]:
    """Returns the jobs of the baseline on two GPUs at once: 8k on both, since no two GPUs are equally fast and a synchronous step waits for the slower."""
    short, long = (Case(layout=ONE_GPU, length=length, gpus=1, variants=variants, rounds=4) for length in ("8k", "32k"))
    return [Job(gpus=1, cases=[short]), Job(gpus=1, cases=[replace(short, layout=OTHER_GPU, variants=(SSA,)), long])]


def one_gpu(variants: tuple[str, ...]) -> list[Job]:
    """Returns the jobs of the baseline, one per length, which run side by side on two GPUs."""
    return [
        Job(gpus=1, cases=[Case(layout=ONE_GPU, length=length, gpus=1, variants=variants)]) for length in ("8k", "32k")
    ]


def scaling(host_gpus: int) -> dict[str, list[Job]]:
    """Returns the jobs by part for a host of 1, 2, 4 or 8 GPUs: layouts that use all of them, and data parallelism over fewer."""
    every = (SSA, FULL, QUARTER)
    jobs, count = one_gpu(every), 2
    while count < host_gpus:
        cases = [Case(layout=f"dp{count}", length=length, gpus=count) for length in ("8k", "32k")]
        jobs.append(Job(gpus=count, cases=cases))
        count *= 2
    parts = {"speed": jobs}
    if host_gpus > 1:
        jobs.append(Job(gpus=host_gpus, cases=_all_gpus(host_gpus, every)))
        layout, settings = _sharded(host_gpus)
        save = Case(layout=layout, length="8k", gpus=host_gpus, settings=settings, kind="save")
        parts["save"] = [Job(gpus=host_gpus, cases=[save])]
    return parts


def _all_gpus(count: int, variants: tuple[str, ...]) -> list[Case]:
    """Returns the layouts over all GPUs of a host, the most important first."""

    def case(layout: str, length: str, degree: int, *settings: str) -> Case | None:
        if count % degree:
            return None
        name = f"{layout} dp{count // degree}" if layout and count > degree else layout or f"dp{count}"
        exposed = (SSA,) if length == "8k" or "cp" in layout else ()
        return Case(layout=name, length=length, gpus=count, settings=settings, variants=variants, exposed=exposed)

    cp2, cp4 = "parallel.cp=2", "parallel.cp=4"
    wanted = [
        case("", "8k", 1),
        case("tp2 pp2", "8k", 4, *TP2, *PP2, SHORT_LAST_STAGE),
        case("tp2", "8k", 2, *TP2),
        case("cp2", "32k", 2, cp2),
        case("pp2 vpp2", "8k", 2, *VPP2),
        case("", "32k", 1),
        case("pp2", "8k", 2, *PP2),
        case("cp4", "32k", 4, cp4),
    ]
    zero = ("engine=deepspeed", "deepspeed.zero_stage=2")
    return [found for found in wanted if found] + [
        Case(layout=f"dp{count} zero2", length="8k", gpus=count, settings=zero)
    ]


def _sharded(count: int) -> tuple[str, tuple[str, ...]]:
    """Returns the layout whose checkpoint is taken: tensor and pipeline parallel if the GPUs allow both."""
    if count % 4:
        return "tp2", TP2
    return "tp2 pp2" + (f" dp{count // 4}" if count > 4 else ""), (*TP2, *PP2)


def case_config(case: Case, size: Size, host_gpus: int, settings: tuple[str, ...] | None = None) -> Config:
    """Returns a case's checked configuration, with the fixed global batch.

    Args:
        case: layout and length.
        size: the model.
        host_gpus: GPUs of the host, which the fixed batch is for.
        settings: of another layout than the case's.

    Raises:
        ConfigError: the layout does not fit the model or the batch.
    """
    length = size.lengths[case.length]
    of_layout = [one.format(last_stage=size.last_stage) for one in (case.settings if settings is None else settings)]
    arguments = [
        *size.settings,
        f"data.sequence_length={length}",
        f"model.rope_scaling.enabled={str(case.length == '32k').lower()}",
        f"training.micro_batch_size={case.rows or size.rows[case.length]}",
        f"training.global_batch_tokens={fixed_rows(case.length, host_gpus) * length}",
        "data.path=none",
        *of_layout,
        *(f"engine.overlap_{what}={str(_has_replicas(case.gpus, of_layout)).lower()}" for what in OVERLAPPED),
    ]
    return resolve_config("train", arguments, Machine(world_size=case.gpus, has_files=False))


def with_equal_share(config: Config, case: Case, size: Size) -> Config:
    """Returns a case's configuration with the batch of weak scaling, `size.tokens_per_gpu` for each GPU."""
    return replace(config, training=replace(config.training, global_batch_tokens=case.gpus * size.tokens_per_gpu))


def _has_replicas(gpus: int, settings: tuple[str, ...]) -> bool:
    """Returns whether several ranks hold the same weights, so that there are gradients to reduce."""
    shards = [int(s.partition("=")[2]) for s in settings if s.startswith(("parallel.tp=", "parallel.pp="))]
    return gpus > math.prod(shards)
