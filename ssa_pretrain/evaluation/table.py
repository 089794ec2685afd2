"""An evaluation's results as text for a terminal: a row per metric, a column per mode."""

from typing import Any

from ssa_pretrain.evaluation import MODES
from ssa_pretrain.evaluation.held_out import mean

HELD_OUT = {
    "cross_entropy": "cross entropy (nats)",
    "perplexity": "perplexity per token",
    "word_perplexity": "perplexity per word",
    "byte_perplexity": "perplexity per byte",
    "bits_per_byte": "bits per byte",
    "captured_mass": "captured mass",
    "entropy": "attention entropy (nats)",
    "gap": "distance of the streams",
    "bound": "its bound (Theorem 1)",
}
NAME_WIDTH = 44


def table(result: dict[str, Any]) -> str:
    """Returns the table of a result, as results.py writes it."""
    settings = result["settings"]
    blocks = f"blocks of {settings['attention.block_size']}, top {settings['attention.top_k']}"
    lines = [
        f"step {result['step']:,}, {result['rows']} held-out rows of {settings['data.sequence_length']:,} tokens, {blocks}"
    ]
    lines += [f"  {key}: {settings[key]} (trained with {value})" for key, value in result["trained_with"].items()]
    lines.append(f"  {'':<{NAME_WIDTH}}" + "".join(f"{mode:>14}" for mode in MODES))
    held_out = {mode: _held_out(result, mode) for mode in MODES}
    lines += [
        _row(shown, [held_out[mode].get(name) for mode in MODES])
        for name, shown in HELD_OUT.items()
        if held_out["full"].get(name) is not None
    ]
    for task, by_mode in result["tasks"].items():
        for name, value in by_mode["full"]["metrics"].items():
            if isinstance(value, float) and not name.endswith("_stderr"):
                lines.append(_row(f"{task}: {name}", [by_mode[mode]["metrics"].get(name) for mode in MODES]))
    for task, by_mode in result["lm_eval"].items():
        shown = [name for name in by_mode["full"] if not name.endswith("_stderr") and name != "sample_len"]
        lines += [_row(f"lm_eval {task}: {name}", [by_mode[mode].get(name) for mode in MODES]) for name in shown]
    return "\n".join(lines)


def _held_out(result: dict[str, Any], mode: str) -> dict[str, Any]:
    """Returns the metrics of a mode by name, with the means over layers and heads."""
    metrics = result["modes"][mode]
    means = {"captured_mass": mean(metrics["captured_mass_by_layer"])}
    if heads := result["heads"].get(mode):
        means["entropy"] = mean([value for layer in heads["entropy_by_head"] for value in layer])
    if bound := result.get("bound", {}).get(mode):
        means |= {name: mean(bound[f"{name}_by_layer"]) for name in ("gap", "bound")}
    return metrics | means


def _row(name: str, values: list[float | None]) -> str:
    """Returns a line of the table."""
    forms = ["" if value is None else "#.6g" if abs(value) >= 1000 else ".4f" for value in values]
    shown = "".join(f"{'-' if v is None else format(v, form):>14}" for v, form in zip(values, forms, strict=True))
    return f"  {name:<{NAME_WIDTH}}{shown}"
