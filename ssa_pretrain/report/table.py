"""The report as text for a terminal, with the values of the page."""

from ssa_pretrain.monitor.by_source import source_lines
from ssa_pretrain.monitor.metrics import perplexity
from ssa_pretrain.report.summary import RunSummary


def table(summary: RunSummary) -> str:
    """Returns the report as text for a terminal, at most 120 columns unless names are long."""
    modes = list(summary.final)
    steps = [record["step"] for record in summary.final.values() or summary.steps[-1:]]
    lines = [f"{summary.name}: held-out text after {max(steps, default=0)} steps"]
    if modes:
        lines.append(
            f"  {'':<24}" + "".join(f"{mode:>12}" for mode in modes) + ("     unigram" if summary.unigram else "")
        )
        entropy = f"{summary.unigram:>12.3f}" if summary.unigram else ""
        unigram_perplexity = f"{perplexity(summary.unigram):>12.1f}" if summary.unigram else ""
        lines.append(f"  {'cross entropy (nats)':<24}" + _cells(summary, "cross_entropy", "12.3f") + entropy)
        lines.append(f"  {'perplexity':<24}" + _cells(summary, "perplexity", "12.1f") + unigram_perplexity)
        if any(summary.final[mode].get("captured_mass") is not None for mode in modes):
            lines.append(f"  {'captured mass':<24}" + _cells(summary, "captured_mass", "12.3f"))
    layers = [row for row in summary.layers("captured_mass_by_layer") if row]
    if layers:
        lines.append("captured mass in training, by layer: first step -> last step")
        lines.append("  " + "  ".join(f"{i}: {row[0][1]:.2f} -> {row[-1][1]:.2f}" for i, row in enumerate(layers)))
    if sources := source_lines(summary.steps):
        lines += ["data by source", *(f"  {line}" for line in sources.splitlines())]
    lines += [f"{name:<14}{value}" for name, value in summary.facts()]
    shown = list(dict.fromkeys(sample["prompt"] for sample in summary.samples))[:2]
    for sample in sorted((s for s in summary.samples if s["prompt"] in shown), key=lambda s: shown.index(s["prompt"])):
        prompt, text = (" ".join(sample[part].split()) for part in ("prompt", "text"))
        lines.append(f"sample, {sample['mode']:<7}{prompt[-40:]} [{text[:60]}]")
    return "\n".join(lines)


def _cells(summary: RunSummary, key: str, form: str) -> str:
    """Returns one metric of every mode in columns."""
    values = [summary.final[mode].get(key) for mode in summary.final]
    return "".join(f"{'-':>12}" if value is None else format(value, form) for value in values)
