"""The content of a report, read from the run's folder.

Reads metrics.jsonl, config.yaml, environment.jsonl and timeline.jsonl; evaluation.json and samples.json if `ssa_pretrain.evaluate` wrote them;
incidents/, hang.txt and the newest health.json (health.py). The dataset's manifest.json gives the unigram entropy: the loss of a model that knows
token frequencies only. A folder of an older version lacks some of these, and its report the parts that need them.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median_high
from typing import Any

import yaml

from ssa_pretrain.errors import CommandError, ExitCode
from ssa_pretrain.monitor.environment import last_start
from ssa_pretrain.monitor.metrics import perplexity
from ssa_pretrain.monitor.metrics_file import FILE_NAME, read_records
from ssa_pretrain.monitor.timeline import read_timeline
from ssa_pretrain.report.goodput import Goodput, goodput
from ssa_pretrain.report.health import RunHealth, read_health
from ssa_pretrain.report.tasks import TaskScores, read_tasks
from ssa_pretrain.run_folder import LOCK
from ssa_pretrain.settings.files import LockedError, require_unlocked
from ssa_pretrain.settings.quantities import compact, duration

REQUIRED_KEYS = {"train": ("tokens",), "evaluation": ("mode", "cross_entropy"), "task": ("task", "mode")}
Points = list[tuple[float, float]]


class ReportError(CommandError, ValueError):
    """The folder lacks a file or a key that a report needs."""

    exit_code = ExitCode.DATA


@dataclass(slots=True)
class RunSummary:
    """The content of a report.

    Attributes:
        name: the run's name.
        config: the saved configuration, nested.
        steps: training records in order.
        evaluations: evaluation records in order, by mode.
        final: newest held-out metrics by mode: cross_entropy, perplexity, captured_mass, captured_mass_by_layer, and the evaluation that
            they come from: step, tokens, rows, by.
        unigram: entropy of the held-out tokens under their own frequencies, nats; None without a manifest.
        samples: prompt, mode and text of sampled continuations.
        samples_step: training step of the weights that the samples were drawn from; None if unknown.
        data: facts about the dataset.
        start: the newest line of environment.jsonl; None if there is none.
        tasks: results of tasks.
        goodput: where the time went; None without timeline.jsonl.
        health: skipped steps, spikes, rollbacks, failed saves and hangs.
    """

    name: str
    config: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: dict[str, list[dict[str, Any]]]
    final: dict[str, dict[str, Any]]
    unigram: float | None = None
    samples: list[dict[str, str]] = field(default_factory=list)
    samples_step: int | None = None
    data: dict[str, str] = field(default_factory=dict)
    start: dict[str, Any] | None = None
    tasks: list[TaskScores] = field(default_factory=list)
    goodput: Goodput | None = None
    health: RunHealth = field(default_factory=RunHealth)

    def series(self, key: str) -> Points:
        """Returns (tokens, value) of every training record that has the key."""
        return [(record["tokens"], record[key]) for record in self.steps if record.get(key) is not None]

    def layers(self, key: str) -> list[Points]:
        """Returns (tokens, value) by layer of the training records, for a key whose values are lists."""
        return _by_layer(self.steps, key)

    def mass_by_layer(self) -> tuple[list[Points], str]:
        """Returns (tokens, captured mass) by layer and where it was measured: in training, else on held-out text with full attention."""
        if rows := self.layers("captured_mass_by_layer"):
            return rows, "in training"
        return _by_layer(self.evaluations.get("full", []), "captured_mass_by_layer"), "on held-out text, full attention"

    @property
    def seconds(self) -> float:
        """Time of all training steps, without evaluations and checkpoints."""
        return sum(record.get("seconds") or 0.0 for record in self.steps)

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the steps."""
        rates = [record["tokens_per_second"] for record in self.steps if record.get("tokens_per_second")]
        return median_high(rates) if rates else None

    def evaluation(self) -> str:
        """Returns which evaluation the final metrics come from: modes, step, tokens, rows, and what ran it."""
        modes: dict[str, list[str]] = {}
        for mode, record in self.final.items():
            modes.setdefault(_evaluation_text(record), []).append(mode)
        return "; ".join(f"{' and '.join(names)}: {text}" for text, names in modes.items())

    def facts(self) -> list[tuple[str, str]]:
        """Returns names and values of what ran, in reading order. Unknown ones are left out."""
        facts = _config_facts(self.config) + list(self.data.items())
        if self.steps:
            last = self.steps[-1]
            facts.append(("length", f"{last['step']:,} steps, {last['tokens']:,} tokens"))
            facts.append(("time in steps", duration(self.seconds)))
        if self.final:
            facts.append(("evaluation", self.evaluation()))
        if self.tokens_per_second:
            facts.append(("speed", f"{compact(self.tokens_per_second)} tokens/s (median)"))
        if self.steps and self.steps[-1].get("mfu") is not None:
            facts.append(("MFU", f"{self.steps[-1]['mfu']:.1%}"))
        if self.goodput:
            facts.append(("goodput", f"{self.goodput.share:.1%} of {duration(self.goodput.total)}"))
        if not self.health.is_clean:
            facts.append(("health", self.health.sentence()))
        if self.start:
            facts.append(("ran on", f"{self.start['processes']} x {self.start['device']}"))
            facts.append(("versions", ", ".join(f"{name} {number}" for name, number in self.start["versions"].items())))
        return facts


def read_summary(folder: Path) -> RunSummary:
    """Reads a run's folder.

    Raises:
        ReportError: the folder contains no run, or one of its files cannot be read.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise ReportError(f"{folder} has no {FILE_NAME}; give the output_dir of a run, such as outputs/quickstart")
    try:
        records = [_checked(record, f"{path}:{number}") for number, record in enumerate(read_records(path), start=1)]
        config = _read(folder / "config.yaml") or {}
        evaluation = _read(folder / "evaluation.json")
        samples = _read(folder / "samples.json") or []
        steps = [record for record in records if record["kind"] == "train"]
        tasks, health = read_tasks(records, folder, evaluation), read_health(folder, records)
    except (ValueError, yaml.YAMLError) as error:
        raise ReportError(str(error)) from error
    evaluations: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record["kind"] == "evaluation":
            evaluations.setdefault(record["mode"], []).append(record)
    manifest = _manifest(folder, config)
    return RunSummary(
        name=config.get("name", folder.name),
        config=config,
        steps=steps,
        evaluations=evaluations,
        final=_final(evaluations, evaluation),
        unigram=manifest.get("unigram_entropy_nats", {}).get("heldout"),
        samples=[sample | {"text": sample["text"].removeprefix(sample["prompt"])} for sample in samples],
        samples_step=(evaluation or {}).get("step"),
        data=_data_facts(manifest),
        start=last_start(folder),
        tasks=tasks,
        goodput=goodput(read_timeline(folder), running=_is_running(folder)),
        health=health,
    )


def _is_running(folder: Path) -> bool:
    """Returns whether a process holds the lock of a run's folder."""
    try:
        require_unlocked(folder / LOCK, patience=0.0)
    except LockedError:
        return True
    return False


def _by_layer(records: list[dict[str, Any]], key: str) -> list[Points]:
    """Returns (tokens, value) by layer, for a key whose values are lists."""
    records = [record for record in records if record.get(key)]
    count = max((len(record[key]) for record in records), default=0)
    return [
        [(r["tokens"], r[key][layer]) for r in records if layer < len(r[key]) and r[key][layer] is not None]
        for layer in range(count)
    ]


def _checked(record: dict[str, Any], place: str) -> dict[str, Any]:
    """Returns a record if it has the keys that its kind requires. Other kinds are not checked."""
    for key in ("kind", *REQUIRED_KEYS.get(record.get("kind", ""), ())):
        if key not in record:
            raise ReportError(f"{place} has no {key!r}; remove the line, or give the output_dir of another run")
    return record


def _read(path: Path) -> Any:
    """Returns the content of a JSON or YAML file, None if there is none."""
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    try:
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except ValueError as error:
        raise ReportError(f"{path} cannot be read ({error}); remove it or write it again") from error


def _manifest(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Returns the manifest of the dataset that the configuration names, or of one in the run's folder; empty without one."""
    for place in (Path(str(config.get("data", {}).get("path", folder / "data"))), folder / "data"):
        found = _read(place / "manifest.json")
        if found:
            return found
    return {}


def _config_facts(config: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the facts of the configuration's sections. Missing sections are left out."""
    facts: list[tuple[str, str]] = []
    if model := config.get("model"):
        shape = f"{model['num_layers']} layers, width {model['hidden_size']}, {model['num_attention_heads']} heads"
        facts.append(
            ("model", f"{model['name']}: {shape} over {model['num_kv_heads']} kv heads of {model['head_dim']}")
        )
    if attention := config.get("attention"):
        blocks = f": {attention['top_k']} blocks of {attention['block_size']} keys"
        facts.append(("attention", attention["method"] + ("" if attention["method"] == "full" else blocks)))
    if parallel := config.get("parallel"):
        degrees = ", ".join(f"{name} {parallel[name]}" for name in ("tp", "pp", "vpp", "cp") if parallel[name] > 1)
        facts.append(("layout", (degrees or "data parallel only") + f", {config['engine']['name']} engine"))
    if precision := config.get("precision"):
        facts.append(("precision", precision["name"]))
    return facts


def _data_facts(manifest: dict[str, Any]) -> dict[str, str]:
    """Returns the dataset in two lines."""
    if not manifest:
        return {}
    tokens = {split: sum(shard["tokens"] for shard in shards) for split, shards in manifest["splits"].items()}
    names = ", ".join(dict.fromkeys(source["name"] for source in manifest["sources"]))
    tokenizer = manifest["tokenizer"]
    return {
        "data": f"{names}: " + ", ".join(f"{compact(count)} tokens {split}" for split, count in tokens.items()),
        "tokenizer": f"{tokenizer['name']}, {tokenizer['vocab_size']:,} entries",
    }


def _final(evaluations: dict[str, list[dict[str, Any]]], written: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Returns the newest metrics of each mode: those of evaluation.json unless training evaluated a later step.

    Args:
        evaluations: records of training by mode.
        written: content of evaluation.json.
    """
    final = {mode: records[-1] | {"by": "during training"} for mode, records in evaluations.items()}
    if not written:
        return final
    for mode, metrics in written["modes"].items():
        if mode in final and final[mode]["step"] > written["step"]:
            continue
        masses = metrics.get("captured_mass_by_layer") or []
        final[mode] = {
            "by": "by ssa_pretrain.evaluate",
            "step": written["step"],
            "tokens": written.get("tokens"),
            "rows": written.get("rows"),
            "cross_entropy": metrics["cross_entropy"],
            "perplexity": perplexity(metrics["cross_entropy"]),
            "captured_mass_by_layer": masses,
            "captured_mass": sum(masses) / len(masses) if masses else None,
        }
    return final


def _evaluation_text(record: dict[str, Any]) -> str:
    """Returns, for example, "step 60, 1,966,080 tokens, 64 held-out rows, during training". Unknown numbers are left out."""
    counts = [
        f"{record[key]:,} {noun}"
        for key, noun in (("tokens", "tokens"), ("rows", "held-out rows"))
        if record.get(key) is not None
    ]
    return ", ".join([f"step {record['step']:,}", *counts, record["by"]])
