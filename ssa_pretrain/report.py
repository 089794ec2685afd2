"""Entry point: `python -m ssa_pretrain.report outputs/quickstart` turns a run's folder into a page and a table.

Reads what a run leaves behind: metrics.jsonl, config.yaml and environment.jsonl; evaluation.json and samples.json if `ssa_pretrain.evaluate` wrote them; the
data's manifest.json for the unigram entropy, the loss of a model that knows word frequencies and nothing else. Writes report.html, one file
that needs no network, and prints the same figures. It changes nothing else and can be run while training goes on.

`Figures` is what both views show; report_page.py lays it out. Exit codes: 0 done, 3 wrong arguments, 4 the folder holds no run.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ssa_pretrain.environment import PACKAGES, last_start
from ssa_pretrain.log import compact, duration
from ssa_pretrain.metrics import FILE_NAME, perplexity, read_records
from ssa_pretrain.report_page import page
from ssa_pretrain.settings.output import pipe_may_close, version_line
from ssa_pretrain.signals import leaves_on_ctrl_c

NEEDED = {"train": ("tokens",), "evaluation": ("mode", "cross_entropy")}


class ReportError(ValueError):
    """The folder does not hold what a report needs."""


@dataclass(slots=True)
class Figures:
    """What a report shows.

    Attributes:
        name: the run's name.
        config: the saved configuration, nested.
        steps: training records in order.
        evaluations: mode -> evaluation records in order.
        final: mode -> the newest held-out metrics: cross_entropy, perplexity, captured_mass, captured_mass_by_layer, and the evaluation that
            they come from: step, tokens, rows, by.
        unigram: entropy of the held-out tokens under their own frequencies, nats; None without a manifest.
        samples: prompt, mode and text of sampled continuations.
        sampled: the step after which they were drawn; None where that is not known.
        data: facts of the dataset.
        start: how the run was started last, see environment.py; None where that is not known.
    """

    name: str
    config: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: dict[str, list[dict[str, Any]]]
    final: dict[str, dict[str, Any]]
    unigram: float | None = None
    samples: list[dict[str, str]] = field(default_factory=list)
    sampled: int | None = None
    data: dict[str, str] = field(default_factory=dict)
    start: dict[str, Any] | None = None

    def series(self, key: str) -> list[tuple[float, float]]:
        """(tokens, value) of every training record that has the key."""
        return [(record["tokens"], record[key]) for record in self.steps if record.get(key) is not None]

    def layers(self, key: str) -> list[list[tuple[float, float]]]:
        """(tokens, value) by layer of a training record's list."""
        records = [record for record in self.steps if record.get(key)]
        count = max((len(record[key]) for record in records), default=0)
        return [
            [(r["tokens"], r[key][layer]) for r in records if layer < len(r[key]) and r[key][layer] is not None]
            for layer in range(count)
        ]

    @property
    def seconds(self) -> float:
        """Time of all training steps, evaluations and checkpoints apart."""
        return sum(record.get("seconds") or 0.0 for record in self.steps)

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the steps; None before the first."""
        rates = sorted(record["tokens_per_second"] for record in self.steps if record.get("tokens_per_second"))
        return rates[len(rates) // 2] if rates else None

    def evaluation(self) -> str:
        """Which evaluation the final metrics come from: modes, step, tokens, rows, and what ran it."""
        modes: dict[str, list[str]] = {}
        for mode, record in self.final.items():
            modes.setdefault(_evaluation(record), []).append(mode)
        return "; ".join(f"{' and '.join(names)}: {said}" for said, names in modes.items())

    def facts(self) -> list[tuple[str, str]]:
        """What ran, as names and values in reading order; unknown ones are left out."""
        config = self.config
        model, attention, parallel = (config.get(section, {}) for section in ("model", "attention", "parallel"))
        rows: list[tuple[str, str]] = []
        if model:
            shape = f"{model['num_layers']} layers, width {model['hidden_size']}, {model['num_attention_heads']} heads"
            rows.append(
                ("model", f"{model['name']}: {shape} over {model['num_kv_heads']} kv heads of {model['head_dim']}")
            )
        if attention:
            blocks = f"{attention['top_k']} blocks of {attention['block_size']} keys"
            rows.append(
                (
                    "attention",
                    f"{attention['method']}" if attention["method"] == "full" else f"{attention['method']}: {blocks}",
                )
            )
        if parallel:
            degrees = ", ".join(f"{name} {parallel[name]}" for name in ("tp", "pp", "vpp", "cp") if parallel[name] > 1)
            rows.append(("layout", (degrees or "data parallel only") + f", {config['engine']['name']} engine"))
        if "precision" in config:
            rows.append(("precision", config["precision"]["name"]))
        rows += list(self.data.items())
        if self.steps:
            last = self.steps[-1]
            rows.append(("length", f"{last['step']:,} steps, {last['tokens']:,} tokens"))
            rows.append(("time in steps", duration(self.seconds)))
        if self.final:
            rows.append(("evaluation", self.evaluation()))
        if self.tokens_per_second:
            rows.append(("speed", f"{compact(self.tokens_per_second)} tokens/s (median)"))
        if self.steps and self.steps[-1].get("mfu") is not None:
            rows.append(("MFU", f"{self.steps[-1]['mfu']:.1%}"))
        if self.start:
            rows.append(("ran on", f"{self.start['processes']} x {self.start['device']}"))
            rows.append(("versions", ", ".join(f"{name} {number}" for name, number in self.start["versions"].items())))
        return rows


def read_figures(folder: Path) -> Figures:
    """Reads a run's folder.

    Raises:
        ReportError: it holds no run, or a file of it cannot be read.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise ReportError(f"{folder} holds no {FILE_NAME}; give the output_dir of a run, such as outputs/quickstart")
    try:
        records = [_complete(record, f"{path}:{number}") for number, record in enumerate(read_records(path), start=1)]
        config = _read(folder / "config.yaml") or {}
        evaluation = _read(folder / "evaluation.json")
        samples = _read(folder / "samples.json") or []
    except (ValueError, yaml.YAMLError) as error:
        raise ReportError(str(error)) from error
    evaluations: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record["kind"] == "evaluation":
            evaluations.setdefault(record["mode"], []).append(record)
    manifest = _manifest(folder, config)
    return Figures(
        name=config.get("name", folder.name),
        config=config,
        steps=[record for record in records if record["kind"] == "train"],
        evaluations=evaluations,
        final=_final(evaluations, evaluation),
        unigram=_unigram(manifest),
        samples=[_continuation(sample) for sample in samples],
        sampled=(evaluation or {}).get("step"),
        data=_dataset(manifest),
        start=last_start(folder),
    )


def table(figures: Figures) -> str:
    """The report as text for a terminal, at most 120 columns but for long names."""
    modes = list(figures.final)
    steps = [record["step"] for record in figures.final.values() or figures.steps[-1:]]
    lines = [f"{figures.name}: held-out text after {max(steps, default=0)} steps"]
    if modes:
        lines.append(
            f"  {'':<24}" + "".join(f"{mode:>12}" for mode in modes) + ("     unigram" if figures.unigram else "")
        )
        entropy = f"{figures.unigram:>12.3f}" if figures.unigram else ""
        chance = f"{perplexity(figures.unigram):>12.1f}" if figures.unigram else ""
        lines.append(f"  {'cross entropy (nats)':<24}" + _cells(figures, "cross_entropy", "12.3f") + entropy)
        lines.append(f"  {'perplexity':<24}" + _cells(figures, "perplexity", "12.1f") + chance)
        if any(figures.final[mode].get("captured_mass") is not None for mode in modes):
            lines.append(f"  {'captured mass':<24}" + _cells(figures, "captured_mass", "12.3f"))
    layers = [row for row in figures.layers("captured_mass_by_layer") if row]
    if layers:
        lines.append("captured mass in training, by layer: first step -> last step")
        lines.append("  " + "  ".join(f"{i}: {row[0][1]:.2f} -> {row[-1][1]:.2f}" for i, row in enumerate(layers)))
    lines += [f"{name:<14}{value}" for name, value in figures.facts()]
    shown = list(dict.fromkeys(sample["prompt"] for sample in figures.samples))[:2]
    for sample in sorted((s for s in figures.samples if s["prompt"] in shown), key=lambda s: shown.index(s["prompt"])):
        prompt, text = (" ".join(sample[part].split()) for part in ("prompt", "text"))
        lines.append(f"sample, {sample['mode']:<7}{prompt[-40:]} [{text[:60]}]")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the command line, writes the page, prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m ssa_pretrain.report", description="A run's folder as a page and a table."
    )
    parser.add_argument("folder", type=Path, help="output_dir of a run")
    parser.add_argument("--out", type=Path, help="file to write; default: FOLDER/report.html")
    parser.add_argument("--version", action="version", version=version_line("ssa_pretrain", PACKAGES[1:]))
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as leaving:
        return 3 if leaving.code else 0
    try:
        figures = read_figures(arguments.folder)
    except ReportError as error:
        print(f"report: {error}", file=sys.stderr)
        return 4
    target = arguments.out or arguments.folder / "report.html"
    try:
        _write(target, page(figures))
    except ReportError as error:
        print(f"report: {error}", file=sys.stderr)
        return 3
    print(table(figures))
    print(f"\nreport: {target}")
    return 0


def _write(target: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    fresh = target.with_name(target.name + ".tmp")
    try:
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, target)
    except OSError as error:
        raise ReportError(
            f"{target} cannot be written ({error.strerror}); give --out=FILE in a folder that is there and may be written to"
        ) from error


def _complete(record: dict[str, Any], place: str) -> dict[str, Any]:
    """A record that has what its kind needs; records of other kinds are not read."""
    for key in ("kind", *NEEDED.get(record.get("kind", ""), ())):
        if key not in record:
            raise ReportError(f"{place} has no {key!r}; remove the line, or give the output_dir of another run")
    return record


def _read(path: Path) -> Any:
    """A JSON or YAML file's content; None where there is none."""
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    try:
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except ValueError as error:
        raise ReportError(f"{path} cannot be read ({error}); remove it or make it again") from error


def _manifest(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The manifest of the data that the configuration names, or of the data inside the run's folder; empty without one."""
    for place in (Path(str(config.get("data", {}).get("path", folder / "data"))), folder / "data"):
        found = _read(place / "manifest.json")
        if found:
            return found
    return {}


def _unigram(manifest: dict[str, Any]) -> float | None:
    """Entropy of the held-out split's token frequencies in nats."""
    return manifest.get("unigram_entropy_nats", {}).get("heldout")


def _dataset(manifest: dict[str, Any]) -> dict[str, str]:
    """The dataset in two lines."""
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
    """The newest metrics of each mode: those of evaluation.json unless training has gone on since."""
    final = {mode: records[-1] | {"by": "during training"} for mode, records in evaluations.items()}
    if not written:
        return final
    for mode, figures in written["modes"].items():
        if mode in final and final[mode]["step"] > written["step"]:
            continue
        masses = figures.get("captured_mass_by_layer") or []
        final[mode] = {
            "by": "by ssa_pretrain.evaluate",
            "step": written["step"],
            "tokens": written.get("tokens"),
            "rows": written.get("rows"),
            "cross_entropy": figures["cross_entropy"],
            "perplexity": perplexity(figures["cross_entropy"]),
            "captured_mass_by_layer": masses,
            "captured_mass": sum(masses) / len(masses) if masses else None,
        }
    return final


def _evaluation(record: dict[str, Any]) -> str:
    """An evaluation in a phrase, such as "step 60, 1,966,080 tokens, 64 held-out rows, during training"; unknown numbers are left out."""
    counts = [
        f"{record[key]:,} {noun}"
        for key, noun in (("tokens", "tokens"), ("rows", "held-out rows"))
        if record.get(key) is not None
    ]
    return ", ".join([f"step {record['step']:,}", *counts, record["by"]])


def _continuation(sample: dict[str, str]) -> dict[str, str]:
    """A sample whose text does not repeat its prompt."""
    return sample | {"text": sample["text"].removeprefix(sample["prompt"])}


def _cells(figures: Figures, key: str, form: str) -> str:
    """One figure of every mode in columns."""
    values = [figures.final[mode].get(key) for mode in figures.final]
    return "".join(f"{'-':>12}" if value is None else format(value, form) for value in values)


if __name__ == "__main__":
    with leaves_on_ctrl_c("ssa_pretrain.report"), pipe_may_close():
        sys.exit(main())
